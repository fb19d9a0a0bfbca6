"""What does one GPU make of the blocks of published models?

On a new GPU, in this order: `python -m pytest -m gpu` (do its kernels compute the same?), `python -m benchmarks.gpu -o
/tmp/gpu.json --quick` (a minute: does it run, does it fit?), then all of it, with `--trace FOLDER` for the dearest
kernels. MFU is judged on a GPU alone; a CPU walks the same way with toys, whose rows say so.
"""
