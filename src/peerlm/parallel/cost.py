"""What sharded tables cost on a mesh: memory, bytes on the way, seconds; formulas of numbers alone.

Suffixes as in `exchange` and `columns`: t tokens of a GPU, T = t rows cols; P entries per token; V vectors per row.
With copies of the tables each has rows x cols GPUs, which exchange tokens; copies average gradients of rows.
Every GPU has tokens of its own, and every layer a table of its own. GPUs of a node are neighbours in the order of
ranks. What a GPU receives of one in its node comes by NVLink, and by the network otherwise.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

FLOAT32 = 4
COUNTERS = 8
"""Bytes of a row's two steps, as exact RowAdamW keeps them."""
MOMENT_COLUMNS = 128
"""Columns that share a second moment where rows are bfloat16: `optim.table_moment_columns`."""
GATHERED = 4.0
"""Times that FSDP2 holds what it gathers of a layer in its backward pass: weights and gradients, each also as sent."""
ROW_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU by its data sheet; per second, links in one direction."""

    memory: float
    """Bytes."""
    memory_bandwidth: float
    nvlink: float
    network: float
    """Of the node's adapters, for each GPU."""
    flops: float
    """Of dense bfloat16 matrix products."""


GPUS = {
    "a100": Gpu(memory=80e9, memory_bandwidth=2.04e12, nvlink=300e9, network=25e9, flops=312e12),
    "h100": Gpu(memory=80e9, memory_bandwidth=3.35e12, nvlink=450e9, network=50e9, flops=989e12),
    "h200": Gpu(memory=141e9, memory_bandwidth=4.8e12, nvlink=450e9, network=50e9, flops=989e12),
    "b200": Gpu(memory=180e9, memory_bandwidth=7.7e12, nvlink=900e9, network=50e9, flops=2250e12),
}


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Layers with product keys and a table of rows each, the tokens of a step, and how they are trained.

    With float32 rows exact AdamW keeps two moments of each number. With bfloat16 rows there is no first moment, and one
    second moment for each `MOMENT_COLUMNS` columns of a vector.
    """

    num_rows: int
    """N, a square number."""
    dim: int
    """D."""
    vectors: int = 2
    """V: 2 of experts, 3 of gated ones, 1 of product-key memory."""
    heads: int = 8
    per_head: int = 16
    key_dim: int = 128
    shared_keys: bool = True
    """Whether all heads have the same sub-keys."""
    layers: int = 1
    tokens: int = 4096
    """t, in one step."""
    row_format: str = "float32"
    activation_bytes: int = 2
    """Of each number of what enters a layer."""
    fused: bool = False
    """Whether rows are updated in the backward pass, so that they have no gradients."""
    dense_parameters: int = 0
    """Of the rest of the model, in float32 and cut over all GPUs by FSDP2."""

    @property
    def entries(self) -> int:
        """P."""
        return self.heads * self.per_head

    @property
    def key_parameters(self) -> int:
        """Numbers in the sub-keys of a layer."""
        return (1 if self.shared_keys else self.heads) * math.isqrt(self.num_rows) * self.key_dim

    @property
    def query_parameters(self) -> int:
        """Numbers in the query map of a layer, which is cut like the rest of the model."""
        return self.dim * self.heads * self.key_dim

    @property
    def cut_parameters(self) -> int:
        """Numbers that FSDP2 cuts."""
        return self.dense_parameters + self.layers * self.query_parameters


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A mesh of GPUs: how many along "replica", "cols" and "rows", and in a node."""

    replica: int = 1
    cols: int
    rows: int
    per_node: int = 8

    @property
    def of_copy(self) -> int:
        """GPUs that hold one copy of the tables."""
        return self.cols * self.rows

    @property
    def gpus(self) -> int:
        """Of the whole mesh."""
        return self.replica * self.of_copy

    def neighbours(self, size: int, stride: int) -> int:
        """Of the others along an axis, how many are in a GPU's own node, for the GPU that has fewest.

        Ranks along the axis are `stride` apart.
        """
        return _fewest_neighbours(self.gpus, self.per_node, size, stride)


@lru_cache
def _fewest_neighbours(gpus: int, per_node: int, size: int, stride: int) -> int:
    if stride >= per_node:
        return 0
    repeats = math.lcm(per_node, size * stride)
    return min(_neighbours(rank, per_node, size, stride) for rank in range(min(gpus, repeats)))


def _neighbours(rank: int, per_node: int, size: int, stride: int) -> int:
    base = rank - rank // stride % size * stride
    begin = rank // per_node * per_node
    first = max(0, -(-(begin - base) // stride))
    last = min(size - 1, (begin + per_node - 1 - base) // stride)
    return last - first


def received_per_token(tables: Tables, shape: Shape) -> dict[str, float]:
    """Bytes that a GPU receives for a layer's pass and backward pass, over its tokens, along each axis of the mesh.

    Along "replica" these are the gradients of as many rows as tokens can have looked up at one GPU, and a count. What
    is not a table is not among them; see `step_bytes`.
    """
    entering = tables.vectors - 1
    width = (4 if entering else 2) * tables.dim
    id_bytes = 4 if tables.num_rows < 2**31 else 8
    of_step = _looked_up_rows(tables, shape) * _row_gradient(tables, shape) + 8
    copies = {"replica": (shape.replica - 1) * of_step / tables.tokens}
    if shape.cols == 1:
        own = width * tables.activation_bytes + (id_bytes + 2 * FLOAT32) * tables.entries
        return {**copies, "cols": 0.0, "rows": float((shape.rows - 1) * own)}
    activations = width * FLOAT32  # columns are exchanged in float32
    numbers = (id_bytes + 2 * FLOAT32 * (1 + entering)) * tables.entries
    return {
        **copies,
        "cols": activations * (shape.cols - 1) / shape.cols + (shape.cols - 1) * numbers,
        "rows": float((shape.rows - 1) * (activations + shape.cols * numbers)),
    }


def step_bytes(tables: Tables, shape: Shape) -> dict[str, float]:
    """Bytes that a GPU receives in a step by "network" and "nvlink", of tables, sub-keys and the rest."""
    found = {"network": 0.0, "nvlink": 0.0}

    def add(received: float, size: int, stride: int) -> None:
        if size > 1:
            near = received * shape.neighbours(size, stride) / (size - 1)
            found["nvlink"] += near
            found["network"] += received - near

    of_token = received_per_token(tables, shape)
    axes = (("rows", shape.rows, 1), ("cols", shape.cols, shape.rows), ("replica", shape.replica, shape.of_copy))
    for axis, size, stride in axes:
        add(tables.layers * tables.tokens * of_token[axis], size, stride)
    others = (shape.gpus - 1) / shape.gpus
    cut = 3 * FLOAT32 * tables.cut_parameters  # gathered in both passes, and gradients
    whole = 2 * FLOAT32 * tables.layers * tables.key_parameters
    add(others * (cut + whole), shape.gpus, 1)
    return found


def memory(tables: Tables, shape: Shape) -> dict[str, float]:
    """Bytes of the fullest GPU by part.

    "gradients" are of rows that are all different, looked up evenly: at most all that a GPU has. "buffers" are an
    estimate: what the exchange keeps for the backward pass of all layers, and what it holds in one, or what averaging a
    table's gradients over copies takes. "gathered" is the
    rest of one layer, whole. The parts are held at once in the backward pass of that. Activations of the
    rest of the model and scores of retrieval are left out.
    """
    local = -(-tables.num_rows // shape.rows)
    columns = tables.dim // shape.cols
    numbers = local * tables.vectors * columns
    size = ROW_BYTES[tables.row_format]
    exact = tables.row_format == "float32"
    moments = 2 * numbers if exact else numbers / MOMENT_COLUMNS
    hit = min(local, shape.replica * _looked_up(tables, shape))
    row_gradients = 0 if tables.fused else hit * _row_gradient(tables, shape)
    whole = tables.key_parameters
    cut = tables.cut_parameters / shape.gpus
    block = tables.dense_parameters / tables.layers + tables.query_parameters
    kept, working = _buffers(tables, shape)
    return {
        "rows": float(tables.layers * numbers * size),
        "moments": float(tables.layers * moments * FLOAT32),
        "counters": float(tables.layers * local * COUNTERS),
        "gradients": float(tables.layers * (row_gradients + whole * FLOAT32) + cut * FLOAT32),
        "buffers": float(tables.layers * kept + working),
        "sub-keys": float(3 * FLOAT32 * tables.layers * whole),
        "the rest": float(3 * FLOAT32 * cut),
        "gathered": GATHERED * FLOAT32 * block if shape.gpus > 1 else 0.0,
    }


def _looked_up(tables: Tables, shape: Shape) -> int:
    """Entries of a copy's tokens in the rows of a GPU, where all ranks have equally many."""
    return shape.cols * tables.tokens * tables.entries


def _looked_up_rows(tables: Tables, shape: Shape) -> int:
    """Rows of a GPU that its copy's tokens look up, all different: at most all that it has."""
    return min(-(-tables.num_rows // shape.rows), _looked_up(tables, shape))


def _row_gradient(tables: Tables, shape: Shape) -> int:
    """Bytes of the gradient of a GPU's part of a row, and of its number."""
    return tables.vectors * tables.dim // shape.cols * FLOAT32 + 8


def _buffers(tables: Tables, shape: Shape) -> tuple[float, float]:
    """Bytes that the exchange of a layer keeps, and those that it holds besides while it works."""
    tokens, entries = shape.of_copy * tables.tokens, shape.of_copy * tables.tokens * tables.entries
    numbers = tokens * tables.dim // shape.cols
    size = tables.activation_bytes if shape.cols == 1 else FLOAT32
    entering = tables.vectors > 1
    exchanged = 2 * numbers * size + 2 * entries * 8
    averaged = 2 * shape.replica * _looked_up_rows(tables, shape) * _row_gradient(tables, shape)  # received, and joined
    working = max(exchanged, averaged if shape.replica > 1 else 0)
    return numbers * size * entering + entries * (8 + FLOAT32), working


UTILISATION = 0.4
"""Share of a GPU's FLOPs that matrix products use."""


def seconds(tables: Tables, shape: Shape, gpu: Gpu) -> dict[str, float]:
    """Seconds of a step by what takes them, each at the full speed of its link or memory, one after another.

    Rows are read in the pass and in the backward pass, for each entry anew. The update reads and writes the rows that
    were looked up with their moments and steps: all different, at most all that a GPU has.
    """
    received = step_bytes(tables, shape)
    parts = memory(tables, shape)
    of_row = tables.vectors * tables.dim / shape.cols * ROW_BYTES[tables.row_format]
    local = -(-tables.num_rows // shape.rows)
    looked_up = _looked_up(tables, shape)
    state = (parts["rows"] + parts["moments"] + parts["counters"]) / local
    gathered = tables.layers * 2 * looked_up * of_row
    updated = 2 * min(shape.replica * looked_up, local) * state
    products = tables.cut_parameters + tables.layers * tables.heads * math.isqrt(tables.num_rows) * tables.key_dim
    products += tables.layers * tables.entries * tables.vectors * tables.dim
    return {
        "network": received["network"] / gpu.network,
        "NVLink": received["nvlink"] / gpu.nvlink,
        "memory": (gathered + updated) / gpu.memory_bandwidth,
        "matrix products": 6 * products * tables.tokens / (UTILISATION * gpu.flops),
    }
