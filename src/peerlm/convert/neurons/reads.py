"""The index of gated neurons: what each of them reads is computed exactly, and how far its gate opens is estimated.

Shape suffixes: T tokens, B of them in a batch, D model width, F neurons, S rank of the sketch, K retrieved per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerlm.convert.neurons.retrieving import RetrievingNeurons
from peerlm.convert.neurons.weights import Neurons
from peerlm.layers.checks import check_sizes, flatten_tokens
from peerlm.ops.functions import ACTIVATIONS
from peerlm.ops.scoring import top_k

RIDGE = 1e-4
"""Added to the inputs' second moments, in shares of their mean: directions that hardly occur are not blown up."""


class NeuronReads(RetrievingNeurons):
    """Retrieve the `retrieved` best of F gated neurons (u_f . x + b_f) act(g_f . x + c_f) v_f for every token.

    How much such a neuron adds is a product of two projections, which no sum of a few terms follows. So the first one
    is computed for all neurons. It is the weight of a retrieved neuron, whose row then holds g and v alone: nothing is
    computed twice. The second is estimated from a sketch of the gates, a linear map of low rank: a neuron's score is
    |u_f . x + b_f| ||v_f|| sqrt(act(sketch_f(x))^2 + missed_f).

    Args:
        dim: D, width of the input.
        hidden: F.
        retrieved: K, 1 to F.
        sketch: S, 0 or more; with 0 a gate counts by its root mean square, and above D there is nothing more to know.
        activation: of the gates, a name in `ACTIVATIONS`.
        biases: whether neurons have biases.

    Attributes:
        num_experts: F.
        read: u and b, a linear map.
        sketch_in, sketch_out, sketch_bias: buffers, (S, D), (F, S) and (F,); zero until `fit_sketch` has made them.
        missed: a buffer, what the sketch misses of a gate's mean square, (F,); one until then.
        lengths: a buffer, ||v_f||, (F,).

    Raises:
        ValueError: a setting is impossible; the message has the setting, its value, and the fix.
    """

    sketch_in: Tensor
    sketch_out: Tensor
    sketch_bias: Tensor
    missed: Tensor
    lengths: Tensor

    def __init__(self, dim: int, hidden: int, *, retrieved: int, sketch: int, activation: str, biases: bool):
        super().__init__()
        check_sizes(dim=dim, hidden=hidden)
        if sketch != 0:
            check_sizes(sketch=sketch)
        rank = min(sketch, dim)
        self.dim = dim
        self.num_experts = hidden
        self.activation = activation
        self.retrieved = retrieved
        self.read = nn.Linear(dim, hidden, bias=biases)
        self.register_buffer("sketch_in", torch.empty(rank, dim))
        self.register_buffer("sketch_out", torch.empty(hidden, rank))
        for name in ("sketch_bias", "missed", "lengths"):
            self.register_buffer(name, torch.empty(hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random reads of unit variance for such inputs; no sketch, so that the largest reads are retrieved."""
        nn.init.normal_(self.read.weight, std=self.dim**-0.5)
        if self.read.bias is not None:
            nn.init.zeros_(self.read.bias)
        for zero in (self.sketch_in, self.sketch_out, self.sketch_bias):
            nn.init.zeros_(zero)
        for one in (self.missed, self.lengths):
            nn.init.ones_(one)

    @torch.no_grad()
    def load_reads(self, neurons: Neurons) -> None:
        """Take what these neurons read with."""
        self.read.weight.copy_(neurons.down)
        if self.read.bias is not None:
            self.read.bias.copy_(torch.zeros_like(self.read.bias) if neurons.down_bias is None else neurons.down_bias)

    def reads(self) -> dict[str, Tensor]:
        """What neurons read with, by the names in `Neurons`; views without gradients."""
        bias = {} if self.read.bias is None else {"down_bias": self.read.bias.detach()}
        return {"down": self.read.weight.detach(), **bias}

    @torch.no_grad()
    def place(self, order_F: Tensor) -> None:
        """Move what belongs to a neuron: place p gets what was at place order_F[p]."""
        for tensor in (*self.read.parameters(), self.sketch_out, self.sketch_bias, self.missed, self.lengths):
            tensor.copy_(tensor[order_F])

    def gate_powers(self, x_TD: Tensor) -> Tensor:
        """The squares of gates, as the sketch has them: (T, F), in float32 at least."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        sketched_TS = x_TD.to(dtype) @ self.sketch_in.to(dtype).T
        gates_TF = torch.addmm(self.sketch_bias.to(dtype), sketched_TS, self.sketch_out.to(dtype).T)
        return ACTIVATIONS[self.activation](gates_TF).square() + self.missed

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights, what a neuron reads (float32 at least), and ids (int64), each (..., 1, K), best first.

        No id comes twice. Every token on its own, so `mask` changes nothing.
        """
        flatten_tokens(x, mask, self.dim)  # which checks them
        x_TD = x.reshape(-1, self.dim)
        reads_TF = self.read(x_TD)
        reads_TF = reads_TF.to(torch.promote_types(reads_TF.dtype, torch.float32))
        with torch.no_grad():
            _, ids_TK = top_k(reads_TF.abs() * self.lengths * self.gate_powers(x_TD).sqrt(), self.retrieved)
        shape = (*x.shape[:-1], 1, self.retrieved)
        return reads_TF.gather(-1, ids_TK).reshape(shape), ids_TK.reshape(shape)

    def extra_flops_per_token(self, context: int) -> int:
        """Forward FLOPs of the sketch; the reads count themselves."""
        return 2 * len(self.sketch_in) * (self.dim + self.num_experts)

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"num_experts={self.num_experts}, retrieved={self.retrieved}, sketch={len(self.sketch_in)}"


@torch.no_grad()
def fit_sketch(index: NeuronReads, neurons: Neurons, inputs_TD: Tensor, batch_size: int) -> float:
    """Make the sketch of these neurons' gates that is best on these inputs; the share of their variance that it misses.

    That is the linear map of rank S nearest to g_f . x, in the mean square over inputs and neurons, each neuron
    weighted by the mean square of its read and by ||v_f||^2. It is found without training. `missed` makes the mean
    square of each gate right.

    Raises:
        ValueError: inputs hold NaN or infinities, or neurons make some of them.
    """
    assert neurons.gate is not None
    weight, wide = index.read.weight, torch.float64
    index.lengths.copy_(neurons.up.norm(dim=-1))
    index.sketch_bias.copy_(torch.zeros_like(index.sketch_bias) if neurons.gate_bias is None else neurons.gate_bias)
    moments_DD = torch.zeros(index.dim, index.dim, dtype=wide)
    read_F, gate_F, sketched_F = (torch.zeros(index.num_experts, dtype=wide) for _ in range(3))
    act = ACTIVATIONS[neurons.activation]
    for batch_BD in inputs_TD.split(batch_size):
        x_BD = batch_BD.to(weight)
        moments_DD += (x_BD.to(wide).T @ x_BD.to(wide)).cpu()
        read_F += index.read(x_BD).to(wide).square().sum(dim=0).cpu()
        gate_F += act(F.linear(x_BD, neurons.gate, neurons.gate_bias)).to(wide).square().sum(dim=0).cpu()
    if not (moments_DD.isfinite().all() and read_F.isfinite().all() and gate_F.isfinite().all()):
        raise ValueError("inputs hold NaN or infinities, or neurons make some of them; look for the layer that does")
    moments_DD /= len(inputs_TD)
    moments_DD += RIDGE * moments_DD.diagonal().mean() * torch.eye(index.dim, dtype=wide)
    values, basis = torch.linalg.eigh(moments_DD)
    root_DD, inverse_DD = ((basis * values.clamp(min=1e-30).pow(power)) @ basis.T for power in (0.5, -0.5))
    cost_F = read_F * neurons.up.to("cpu", wide).square().sum(dim=-1)
    whitened_FD = neurons.gate.to("cpu", wide) @ root_DD
    variances, directions = torch.linalg.eigh((whitened_FD.T * cost_F) @ whitened_FD)
    kept_DS = directions[:, index.dim - len(index.sketch_in) :]
    index.sketch_in.copy_(kept_DS.T @ inverse_DD)
    index.sketch_out.copy_(whitened_FD @ kept_DS)
    index.missed.zero_()
    for batch_BD in inputs_TD.split(batch_size):
        sketched_F += index.gate_powers(batch_BD.to(weight)).to(wide).sum(dim=0).cpu()
    index.missed.copy_(((gate_F - sketched_F) / len(inputs_TD)).clamp(min=0))
    kept = variances[index.dim - len(index.sketch_in) :].sum() / variances.sum().clamp(min=torch.finfo(wide).tiny)
    return 1 - kept.item()
