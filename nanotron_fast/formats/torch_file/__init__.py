"""The files that torch.save writes, read and written without torch."""

from nanotron_fast.formats.torch_file.reading import DTYPES as DTYPES
from nanotron_fast.formats.torch_file.reading import StoredTensor as StoredTensor
from nanotron_fast.formats.torch_file.reading import read_torch_file as read_torch_file
from nanotron_fast.formats.torch_file.writing import Layout as Layout
from nanotron_fast.formats.torch_file.writing import NewTensor as NewTensor
from nanotron_fast.formats.torch_file.writing import lay_out as lay_out
