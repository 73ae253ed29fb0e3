"""Where calibration and evaluation data come from: texts, packed into token sequences, or samples of other media."""

from rocket.data.documents import check_documents, load_documents, source_stamp
from rocket.data.packing import cut_windows, leading_token, pack_tokens
from rocket.data.samples import Sample, check_samples, load_samples
from rocket.data.sources import check_source, holds_samples
from rocket.data.splits import Split

__all__ = [
    "Sample",
    "Split",
    "check_documents",
    "check_samples",
    "check_source",
    "cut_windows",
    "holds_samples",
    "leading_token",
    "load_documents",
    "load_samples",
    "pack_tokens",
    "source_stamp",
]
