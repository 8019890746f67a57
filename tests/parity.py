"""Random configurations of torch.nn's recurrent modules, and the comparison of fastrnn with torch.nn on one:
outputs, final states and every gradient. Used by the tests and by sweep.py.

``rounding`` is the dtype whose numbers inputs and gradients are, when they are computed with in another one:
so that float64 can tell how far off a narrower dtype is."""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn

SIZES = (1, 2, 3, 7, 16, 17, 33, 65)


@dataclass(frozen=True)
class Configuration:
    """One module with one input; everything random about it comes from ``seed``."""

    seed: int
    kind: str  # a class of torch.nn
    I: int
    H: int
    options: dict = field(default_factory=dict)
    T: int = 1
    B: int = 1
    form: str = "dense"  # dense, packed, sorted (packed in order of length) or unbatched
    memory: str = "contiguous"  # of the input: or transposed, expanded, sliced
    state: str = "none"  # or given, expanded
    eval_mode: bool = False

    @property
    def is_cell(self) -> bool:
        return self.kind.endswith("Cell")


def draw(seed: int, large: bool = True) -> Configuration:
    """A random configuration. ``large`` ones are wide enough to be shared out among threads by units."""
    r = random.Random(seed)
    kind = r.choice(["LSTM", "LSTM", "GRU", "GRU", "RNN", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
    I, H, T, B = r.choice(SIZES), r.choice(SIZES), r.choice([1, 2, 5, 9]), r.choice([0, 1, 2, 3, 5, 13])
    form = r.choice(["dense", "dense", "packed", "sorted", "unbatched"])
    if large and r.random() < 0.15:
        H, T, B = r.choice([129, 200, 257]), r.choice([3, 30]), r.choice([1, 2, 3, 8, 33])
    options: dict = {"bias": r.random() < 0.8}
    if kind.endswith("Cell"):
        form = "unbatched" if form == "unbatched" else "dense"
    else:
        layers = r.choice([1, 1, 2, 3])
        options |= {
            "num_layers": layers,
            "batch_first": r.random() < 0.5,
            "bidirectional": r.random() < 0.4,
            "dropout": r.choice([0.0, 0.0, 0.3, 1.0]) if layers > 1 else 0.0,
        }
    if kind == "LSTM" and H > 1 and r.random() < 0.4:
        options["proj_size"] = r.randint(1, H - 1)
    if kind.startswith("RNN"):
        options["nonlinearity"] = r.choice(["tanh", "relu"])
    if form in ("packed", "sorted"):
        B = max(B, 1)
    return Configuration(
        seed, kind, I, H, options, T, B, form,
        memory=r.choice(["contiguous", "contiguous", "transposed", "expanded", "sliced"]),
        state=r.choice(["none", "given", "given", "expanded"]),
        eval_mode=r.random() < 0.2,
    )  # fmt: skip


def make_modules(config: Configuration, dtype=torch.float64) -> tuple[nn.Module, nn.Module]:
    """torch.nn's module and ours with the same weights."""
    torch.manual_seed(config.seed)
    theirs = getattr(nn, config.kind)(config.I, config.H, dtype=dtype, **config.options)
    ours = getattr(fastrnn, config.kind)(config.I, config.H, dtype=dtype, **config.options)
    ours.load_state_dict(theirs.state_dict())
    for module in (theirs, ours):
        module.train(not config.eval_mode)
    return theirs, ours


def in_memory(x: Tensor, memory: str) -> Tensor:
    """The numbers of x in another arrangement (expanded: those of its first row of dimension 0)."""
    if memory == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if memory == "expanded" and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    if memory == "sliced":
        return torch.stack((x, torch.full_like(x, float("nan"))), -1)[..., 0]
    return x


def make_inputs(
    config: Configuration, dtype=torch.float64, device="cpu", rounding=None
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """(x, lengths or None, the states given: none, h or h and c)."""
    generator = torch.Generator().manual_seed(config.seed)

    def normal(*shape: int) -> Tensor:
        numbers = torch.randn(*shape, dtype=torch.float64, generator=generator)
        return numbers.to(rounding or dtype).to(device, dtype)

    batch = () if config.form == "unbatched" else (config.B,)
    if config.is_cell:
        shape, states = (*batch, config.I), batch
    else:
        steps = (config.T,)
        shape = (*batch, *steps) if config.options["batch_first"] else (*steps, *batch)
        shape += (config.I,)
        directions = 2 if config.options["bidirectional"] else 1
        states = (config.options["num_layers"] * directions, *batch)
    x = in_memory(normal(*shape), config.memory)
    lengths = None
    if config.form in ("packed", "sorted"):
        lengths = torch.randint(1, config.T + 1, (config.B,), generator=generator)
        lengths = lengths.sort(descending=True).values if config.form == "sorted" else lengths
    hidden = []
    if config.state != "none":
        widths = [config.options.get("proj_size") or config.H]
        widths += [config.H] if config.kind.startswith("LSTM") else []
        memory = "expanded" if config.state == "expanded" else "contiguous"
        hidden = [in_memory(normal(*states, width), memory) for width in widths]
    return x, lengths, hidden


def call(module: nn.Module, config: Configuration, x: Tensor, lengths, hidden: list[Tensor]):
    """The outputs as a list: y (of a PackedSequence its data), h_n, c_n."""
    inputs: Tensor | PackedSequence = x
    if lengths is not None:
        inputs = pack_padded_sequence(
            x, lengths, config.options["batch_first"], enforce_sorted=config.form == "sorted"
        )
    hx = None
    if hidden:
        hx = tuple(hidden) if config.kind.startswith("LSTM") else hidden[0]
    result = module(inputs, hx)
    if config.is_cell:
        return list(result) if isinstance(result, tuple) else [result]
    y, states = result
    if lengths is not None:
        y = y.data
    return [y, *(states if isinstance(states, tuple) else (states,))]


def run(
    module: nn.Module, config: Configuration, dtype=torch.float64, device="cpu", rounding=None
) -> dict[str, Tensor]:
    """Outputs and gradients by name. The loss uses some of the outputs; some inputs want no gradient."""
    r = random.Random(config.seed + 1)
    x, lengths, hidden = make_inputs(config, dtype, device, rounding)
    leaves = {"x": x, **dict(zip(("h0", "c0"), hidden, strict=False)), **dict(module.named_parameters())}
    for leaf in leaves.values():
        leaf.grad = None
        leaf.requires_grad_(r.random() < 0.85)
    next(reversed(leaves.values())).requires_grad_(True)
    torch.manual_seed(config.seed)  # dropout
    outputs = call(module, config, x, lengths, hidden)
    after = torch.rand(())  # both must have drawn as many random numbers
    chosen = [o for o in outputs if r.random() < 0.7] or outputs[-1:]
    generator = torch.Generator().manual_seed(config.seed + 2)
    factors = [torch.randn(o.shape, dtype=torch.float64, generator=generator) for o in chosen]
    loss = sum((o * f.to(rounding or dtype).to(o)).sum() for o, f in zip(chosen, factors, strict=True))
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)} | {"random": after}
    for name, leaf, gradient in zip(wanted, wanted.values(), gradients, strict=True):
        results[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance=1e-9) -> list[str]:
    """What differs, in words; shapes, dtypes and values (to float64 accuracy, NaN equal to NaN)."""
    found = [f"only one side has {name}" for name in ours.keys() ^ theirs.keys()]
    for name in ours.keys() & theirs.keys():
        a, b = ours[name], theirs[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            found.append(f"{name}: {tuple(a.shape)} {a.dtype}, torch.nn {tuple(b.shape)} {b.dtype}")
        elif not torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True):
            found.append(f"{name}: off by {(a - b).abs().max().item():.2e}")
    return found


def check(config: Configuration, dtype=torch.float64) -> list[str]:
    theirs, ours = make_modules(config, dtype)
    return differences(run(ours, config, dtype), run(theirs, config, dtype))
