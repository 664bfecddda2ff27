"""The two kinds of checkpoint as sides of a plan, to read from and to write to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from nanotron_fast.checkpoints.names import explain
from nanotron_fast.checkpoints.plan.equality import MustBeEqual, of_kv_heads
from nanotron_fast.checkpoints.plan.intersection import NamedMove
from nanotron_fast.checkpoints.plan.quantised import QuantisedTensor, QuantisedTensors
from nanotron_fast.errors import CheckpointError, PartialCheckpointError, UnsupportedModelError
from nanotron_fast.families.parts import Address, Param, Part, Share, Sizes
from nanotron_fast.formats.chunks import Chunk
from nanotron_fast.formats.huggingface.checkpoint import HfCheckpoint, StoredTensor
from nanotron_fast.formats.nanotron import checkpoint as nanotron
from nanotron_fast.formats.nanotron.checkpoint import NanotronCheckpoint, Shard
from nanotron_fast.formats.nanotron.slices import check_metadata, shard_metadata
from nanotron_fast.formats.new_files import NewFile
from nanotron_fast.formats.patterns import matches
from nanotron_fast.model.spread import has_copies
from nanotron_fast.model.topology import Topology
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.pieces import Piece, intersect
from nanotron_fast.moves.plan import OutputFile
from nanotron_fast.moves.scales import Quantised, Scales

# A tied model's file may hold its matrix under this name as well, or under this name alone.
TIED_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
# What to do where the two are not equal.
UNTIE = (
    "If the head was trained apart, set tie_word_embeddings to false in config.json; if not, leave "
    f"it out with --ignore-tensors {TIED_HEAD}"
)

# Buffers that old files kept among the weights.
_IGNORED = ("*.rotary_emb.inv_freq", "*.masked_bias")


def is_ignored(name: str, buffers: tuple[str, ...] = ()) -> bool:
    """Whether a tensor is no weight: it is neither converted nor compared.

    `buffers` are patterns of its family's own.
    """
    return matches(name, (*_IGNORED, *buffers))


def float_dtype(name: str, dtype: str, path: Path) -> Dtype:
    """The dtype of a tensor that may be converted. Raises UnsupportedModelError."""
    if dtype not in Dtype.__members__:
        raise UnsupportedModelError(
            f"{path}: {name} is {dtype}: quantised or integer weights cannot be trained by "
            "Nanotron; start from the model in bf16, fp16 or fp32"
        )
    return Dtype[dtype]


class Files:
    """Paths, numbered in order of first use."""

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self._numbers: dict[Path, int] = {}

    def number(self, path: Path) -> int:
        if path not in self._numbers:
            self._numbers[path] = len(self.paths)
            self.paths.append(path)
        return self._numbers[path]


def piece_of(share: Share, file: int, begin_bytes: int, dtype: Dtype) -> Piece:
    """A share of a part as a piece of a file whose tensor begins at `begin_bytes`."""
    return Piece(
        file=file,
        offset_bytes=begin_bytes + share.offset * dtype.itemsize,
        dtype=dtype,
        low=share.low,
        high=share.high,
        strides=share.strides,
    )


class HfSource:
    """The tensors of a Hugging Face checkpoint."""

    def __init__(self, checkpoint: HfCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.files = Files()
        self.used: set[str] = set()
        self._dtypes: dict[str, Dtype] = {}
        self._quantised = QuantisedTensors(checkpoint)

    def find(self, part: Part) -> tuple[Address, StoredTensor | QuantisedTensor]:
        """The tensor that holds a part, which is used then. CheckpointError: it is missing."""
        tensors = self.checkpoint.tensors
        for address in part.tensors:
            tensor = tensors.get(address.name)
            if tensor is None:
                packed = self._quantised.find(address)
                if packed is not None:
                    self.used.update(packed.names)
                    return address, packed
                continue
            if tensor.info.shape != address.shape:
                raise CheckpointError(
                    f"{tensor.path}: {address.name} has shape {list(tensor.info.shape)}, "
                    f"config.json calls for {list(address.shape)}"
                )
            quantised = self._quantised.find(address)
            self.used.update((address.name,) if quantised is None else quantised.names)
            return address, quantised or tensor
        wanted = [address.name for address in part.tensors]
        why = explain(self.checkpoint.tensors, wanted, self.checkpoint.ignored)
        raise CheckpointError(
            f"{self.checkpoint.root}: {' or '.join(wanted)} is missing, and config.json calls for "
            f"it{why}"
        )

    def dtype(self, part: Part) -> Dtype:
        """The dtype that a part is stored in; of a quantised one, what it becomes by itself."""
        address, tensor = self.find(part)
        if isinstance(tensor, QuantisedTensor):
            return self._quantised.dtype
        return self._dtype_of(address, tensor)

    def quantised(self, part: Part) -> Quantised | None:
        """The element type of a part that is quantised."""
        _, tensor = self.find(part)
        return tensor.dtype if isinstance(tensor, QuantisedTensor) else None

    def _dtype_of(self, address: Address, tensor: StoredTensor) -> Dtype:
        name = tensor.info.dtype
        dtype = self._dtypes.get(name)
        if dtype is None:
            dtype = self._dtypes[name] = float_dtype(address.name, name, tensor.path)
        return dtype

    def pieces(self, param: Param, part: Part) -> list[Piece]:
        address, tensor = self.find(part)
        if isinstance(tensor, QuantisedTensor):
            return self._quantised_pieces(part, address, tensor)
        dtype = self._dtype_of(address, tensor)
        if not tensor.chunks:
            file = self.files.number(tensor.path)
            return [piece_of(part.whole(address), file, tensor.info.begin_bytes, dtype)]
        return [
            piece_of(share, self.files.number(chunk.path), chunk.begin_bytes, dtype)
            for chunk in tensor.chunks
            for share in part.within(address, chunk.low, chunk.sizes, chunk.strides)
        ]

    def _quantised_pieces(
        self, part: Part, address: Address, tensor: QuantisedTensor
    ) -> list[Piece]:
        begin_bytes = tensor.codes.info.begin_bytes
        file = self.files.number(tensor.codes.path)
        scales = Scales(
            source=self.files.number(tensor.scales.path),
            offset=tensor.scales.info.begin_bytes,
            dtype=tensor.scale_dtype,
            codes_offset=begin_bytes,
            rows=tensor.rows,
            columns=tensor.columns,
            block_rows=tensor.block_rows,
            block_columns=tensor.block_columns,
        )
        start = (0,) * len(address.shape)
        return [
            Piece(
                file=file,
                offset_bytes=begin_bytes,
                dtype=tensor.dtype,
                low=share.low,
                high=share.high,
                strides=share.strides,
                scales=scales,
                first=share.offset,
            )
            for share in part.within(address, start, address.shape, tensor.strides)
        ]

    @property
    def has_tied_copy(self) -> bool:
        """Whether a head lies beside the embedding that was used for it."""
        return (
            TIED_HEAD in self.checkpoint.tensors
            and TIED_HEAD not in self.used
            and _EMBEDDING in self.used
        )

    def tied_copy(self) -> tuple[MustBeEqual, ...]:
        """The embedding beside its copy. CheckpointError where they cannot be equal."""
        first, second = _EMBEDDING, TIED_HEAD
        a, b = self.checkpoint.tensors[first], self.checkpoint.tensors[second]
        if (a.info.shape, a.info.dtype) != (b.info.shape, b.info.dtype):
            raise CheckpointError(
                f"{b.path}: tie_word_embeddings is true, but {second} is {b.info.dtype} "
                f"{list(b.info.shape)} and {first} is {a.info.dtype} {list(a.info.shape)}. {UNTIE}"
            )
        dtype = float_dtype(first, a.info.dtype, a.path)
        moves = (
            intersect(self._matrix(piece, dtype), self._matrix(other, dtype))
            for piece in a.pieces
            for other in b.pieces
        )
        differ = f"tie_word_embeddings is true, but {second} differs from {first}"
        return tuple(
            MustBeEqual(NamedMove(move, TIED_HEAD), differ, advice=UNTIE)
            for move in moves
            if move is not None
        )

    def _matrix(self, chunk: Chunk, dtype: Dtype) -> Piece:
        """A chunk of a matrix as a piece of it."""
        (row, column), (rows, columns), strides = chunk.low, chunk.sizes, chunk.strides
        return Piece(
            file=self.files.number(chunk.path),
            offset_bytes=chunk.begin_bytes,
            dtype=dtype,
            low=(row, column, 0),
            high=(row + rows, column + columns, 1),
            strides=(strides[0], strides[1], 0),
        )


class NanotronSource:
    """The tensors of a Nanotron checkpoint, checked against the model they should make."""

    # Which state of a parameter is read in the place of its weights.
    state = ""

    def __init__(self, checkpoint: NanotronCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.sizes = {"tp": checkpoint.tp, "ep": checkpoint.ep}
        self.files = Files()
        self.used: set[str] = set()

    def dtype(self, param: Param) -> Dtype:
        """The dtype that a parameter is stored in."""
        shards = self._shards(param)
        dtypes = {shard.info.dtype for shard in shards}
        if len(dtypes) > 1:
            raise CheckpointError(
                f"{self.checkpoint.root}: shards of {param.name} have different dtypes: "
                f"{', '.join(sorted(dtypes))}"
            )
        return float_dtype(param.name, dtypes.pop(), shards[0].path)

    def _shards(self, param: Param) -> tuple[Shard, ...]:
        shards = self.checkpoint.params.get(param.name)
        if shards is None:
            why = explain((), [param.name], self.checkpoint.ignored)
            there = self.checkpoint.there
            if there is not None and not why:
                part = nanotron.says_part(there, self.checkpoint.tp, self.checkpoint.pp)
                raise PartialCheckpointError(
                    f"{self.checkpoint.root}: {part}: {param.name} is missing"
                )
            raise CheckpointError(
                f"{self.checkpoint.root}: {param.name} is missing, and "
                f"{nanotron.MODEL_CONFIG} calls for it{why}"
            )
        if param.name not in self.used:
            self._check(param, shards)
            self.used.add(param.name)
        return shards

    def _check(self, param: Param, shards: tuple[Shard, ...]) -> None:
        is_sharded = param.name in self.checkpoint.sharded
        cuts = param.cuts_at(self.sizes)
        if is_sharded != bool(cuts):
            kind = "split over ranks" if is_sharded else "not split over ranks"
            raise CheckpointError(
                f"{shards[0].path}: {param.name} is {kind}, which it is never in Nanotron"
            )
        tp = self.checkpoint.tp
        shape = param.local_shape(self.sizes)
        for shard in shards:
            if shard.info.shape != shape:
                raise CheckpointError(
                    f"{shard.path}: shape {list(shard.info.shape)}, "
                    f"{nanotron.MODEL_CONFIG} at TP={tp} calls for {list(shape)}"
                )
            if cuts:
                ranks = {"tp": shard.tp_rank, "ep": shard.ep_rank}
                expected = _metadata(param, self.sizes, ranks, version="")
                check_metadata(shard.path, shard.metadata, expected)

    def pieces(self, param: Param, part: Part) -> list[Piece]:
        """See `Side`. Of what several ranks have copies of, those of the first."""
        return [
            piece
            for ranks, piece in self._shares(param, part)
            if not param.copy_of(part, self.sizes, ranks)
        ]

    def _shares(self, param: Param, part: Part) -> Iterator[tuple[Sizes, Piece]]:
        """What each rank has of a part: a piece, or several."""
        dtype = self.dtype(param)
        shards = self._shards(param)
        for ranks, shard in zip(param.shards(self.sizes), shards, strict=False):
            if param.has(part, self.sizes, ranks):
                file = self.files.number(shard.path)
                share = param.share(part, self.sizes, ranks)
                yield ranks, piece_of(share, file, shard.info.begin_bytes, dtype)

    def copies(self, params: Iterable[Param]) -> Iterator[MustBeEqual]:
        """What several ranks have copies of, beside what the first of them has."""
        for param in params:
            if has_copies(param.heads, self.sizes["tp"]):
                for part in param.parts:
                    shares = self._shares(param, part)
                    yield from of_kv_heads(param, part, shares, self.sizes, what=self.state)


class PublishedTarget:
    """Files of a published model that are to be written.

    Args:
        files: what they hold beside tensors, and where tensors begin, by the name they get.
        names: the names that a tensor gets, from Hugging Face's; each is written.
        dtypes: by Hugging Face's names.
    """

    def __init__(
        self,
        files: Iterable[NewFile],
        dtypes: Mapping[str, Dtype],
        names: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.outputs: list[OutputFile] = []
        self._places: dict[str, tuple[int, int]] = {}
        self._dtypes = dtypes
        self._names = names
        for index, file in enumerate(files):
            self.outputs.append(OutputFile(file.name, file.header, file.size_bytes, file.literals))
            for name, offset in file.offsets.items():
                self._places[name] = index, offset

    def pieces(self, param: Param, part: Part) -> list[Piece]:
        whole = part.whole(part.tensors[0])
        names = (part.name,) if self._names is None else self._names[part.name]
        return [
            piece_of(whole, file, begin_bytes, self._dtypes[part.name])
            for file, begin_bytes in map(self._places.__getitem__, names)
        ]


class NanotronTarget:
    """Nanotron files that are to be written, at a topology."""

    def __init__(
        self,
        params: Iterable[Param],
        dtypes: dict[str, Dtype],
        topology: Topology,
        *,
        stage_of: Callable[[int | str], int],
        version: str,
    ) -> None:
        self.sizes = topology.sizes
        self.outputs: list[OutputFile] = []
        # Of each output, its stage, and its tensor-parallel rank where it is not for all of them.
        self.ranks: list[tuple[int, int | None]] = []
        self._dtypes = dtypes
        # Of each shard of a parameter: its ranks, its file, and where its tensor begins in that.
        self._places: dict[str, list[tuple[dict[str, int], int, int]]] = {}
        tp, pp = topology.tp, topology.pp
        for param in params:
            shape = param.local_shape(self.sizes)
            dtype = dtypes[param.name]
            places = self._places[param.name] = []
            stage = stage_of(param.block)
            for ranks in param.shards(self.sizes):
                metadata: dict[str, str] = {}
                shard = None
                expert = (ranks["ep"], topology.ep) if "ep" in ranks else None
                if ranks:
                    shard = (stage, pp, ranks.get("tp", 0), tp)
                    metadata = _metadata(param, self.sizes, ranks, version=version)
                header, start = nanotron.tensor_header(dtype, shape, metadata)
                size = dtype.itemsize
                for length in shape:
                    size *= length
                places.append((ranks, len(self.outputs), start))
                self.ranks.append((stage, ranks.get("tp")))
                self.outputs.append(
                    OutputFile(
                        nanotron.tensor_path(param.name, shard, expert), header, start + size
                    )
                )

    def pieces(self, param: Param, part: Part) -> list[Piece]:
        dtype = self._dtypes[param.name]
        return [
            piece_of(param.share(part, self.sizes, ranks), file, begin_bytes, dtype)
            for ranks, file, begin_bytes in self._places[param.name]
            if param.has(part, self.sizes, ranks)
        ]


def _metadata(param: Param, sizes: Sizes, ranks: Sizes, *, version: str) -> dict[str, str]:
    """What the header of a shard says: one axis cuts the parameter, tp or ep."""
    ((axis, dim),) = param.cuts_at(sizes).items()
    return shard_metadata(
        param.shape,
        split=dim,
        chunks=param.chunks,
        tp=sizes[axis],
        rank=ranks[axis],
        version=version,
        heads=param.heads,
    )
