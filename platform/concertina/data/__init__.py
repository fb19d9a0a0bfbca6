"""Corpora: text to tokens on disk, fixed-length sequences of them, and samplers that know no world size."""

from concertina.data.corpus import Manifest, TokenCorpus
from concertina.data.mixture import Mixture, MixtureView, Part, make_sampler, open_corpus, parts_of
from concertina.data.prepare import Progress, corpus_folder, fingerprint, prepare
from concertina.data.sampler import GlobalSampler, Sampler, share
from concertina.data.sequences import IGNORED_TARGET, Sequences, SequenceView, Split
from concertina.data.sources import STDLIB, find_files

__all__ = [
    "IGNORED_TARGET",
    "STDLIB",
    "GlobalSampler",
    "Manifest",
    "Mixture",
    "MixtureView",
    "Part",
    "Progress",
    "Sampler",
    "SequenceView",
    "Sequences",
    "Split",
    "TokenCorpus",
    "corpus_folder",
    "find_files",
    "fingerprint",
    "make_sampler",
    "open_corpus",
    "parts_of",
    "prepare",
    "share",
]
