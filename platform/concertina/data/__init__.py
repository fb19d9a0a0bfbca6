"""Corpora: text to tokens on disk, fixed-length sequences of them, and the sampler that knows no world size."""

from concertina.data.corpus import Manifest, TokenCorpus
from concertina.data.prepare import Progress, corpus_folder, fingerprint, prepare
from concertina.data.sampler import GlobalSampler, share
from concertina.data.sequences import IGNORED_TARGET, SequenceView, Split
from concertina.data.sources import STDLIB, find_files

__all__ = [
    "IGNORED_TARGET",
    "STDLIB",
    "GlobalSampler",
    "Manifest",
    "Progress",
    "SequenceView",
    "Split",
    "TokenCorpus",
    "corpus_folder",
    "find_files",
    "fingerprint",
    "prepare",
    "share",
]
