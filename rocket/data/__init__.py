"""Where calibration and evaluation data come from: texts, packed into token sequences, or samples of other media."""

from rocket.data.documents import Documents, load_documents, source_stamp
from rocket.data.packing import pack_tokens
from rocket.data.samples import Sample, load_samples
from rocket.data.sources import check_source, holds_samples
from rocket.data.splits import Split

__all__ = [
    "Documents",
    "Sample",
    "Split",
    "check_source",
    "holds_samples",
    "load_documents",
    "load_samples",
    "pack_tokens",
    "source_stamp",
]
