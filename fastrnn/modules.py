"""``LSTM``, ``GRU``, ``RNN`` and their cells: torch.nn's modules with fastrnn's kernels under them.

They inherit everything from torch.nn but ``forward``, so parameters, initialisation, state_dict, pickling
and every tool that looks for ``nn.LSTM`` work unchanged. ``forward`` looks for its weights at each call where
torch.nn does, so that parametrizations, functional_call and replaced parameters take effect.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx import Proxy
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from . import _autograd, _direct, _options, _prepack, functional
from ._warn import warn
from .functional import Lengths
from .reference import CELLS

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]
_States = tuple[Tensor, Tensor]  # (h, c)


def _torch_name(module: nn.Module) -> str:
    """The name of the torch.nn class that a module replaces, for messages."""
    name = next(c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules"))
    return type(module).__name__ if name.endswith("Base") else name  # those that torch.nn has not


def _torch_forward(module: nn.Module, input, hx):
    """torch.nn's own forward: while a trace records, and after to_torch() for callers that hold the bound
    forward from before."""
    if isinstance(module, _Fused):
        functional.takes_torch_path(next(module.parameters()))
    return getattr(nn.modules.rnn, _torch_name(module)).forward(module, input, hx)


def _rows_of_first_step(batch_sizes: Tensor, hx) -> int:
    """B of a packed sequence. Under FakeTensorMode batch_sizes may still be real; if not, B is that of hx."""
    fake = torch._C._TorchDispatchModeKey.FAKE
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(fake) is None:
        return int(batch_sizes[0])
    if not isinstance(batch_sizes, FakeTensor):
        with unset_fake_temporarily():
            return int(batch_sizes[0])
    return int(batch_sizes[0]) if hx is None else tree_leaves(hx)[0].shape[1]


def block_diagonal(w_hh: Tensor, heads: int) -> Tensor:
    """W_hh [G*H, H], zero from a unit to those of other heads, from the blocks [G*H, H/heads]."""
    size = w_hh.shape[1]
    blocks = w_hh.reshape(-1, heads, size, 1, size)  # [G, head, unit, 1, unit]
    own = torch.eye(heads, dtype=w_hh.dtype, device=w_hh.device).view(heads, 1, heads, 1)
    return (blocks * own).reshape(-1, heads * size)


class _Fused(nn.Module):
    """What all six share: prepack() serves them by ``_scan_layers``, and they give up their packs when they
    are trained; in a graph of torch.fx they are leaves, as torch.nn's modules are.

    Options are kept by name in a place of their own: subclasses have attributes of the same names."""

    hidden_size: int
    _fused_options: dict[str, Any] = {}  # noqa: RUF012  those that are on; never changed in place
    _plain_cell: Callable[[], str]  # without options
    _add_vectors: Callable[[dict[str, int]], None]

    def _set_options(self, **values: Any) -> None:
        """The end of a constructor, with its options."""
        if options := _options.on(self, values):
            self._fused_options = options
            _options.check_cell(self._cell_name(), options, getattr(self, "proj_size", 0))
            self._keep_gates(CELLS[self._cell_name()].gates)
            if "heads" in options:
                self._split_heads(options["heads"])
            if vectors := self._vectors():
                self._add_vectors(vectors)
            self._initialise_options()

    def _cell_name(self) -> str:
        return _options.cell_name(self._plain_cell(), self._fused_options)

    def _vectors(self) -> dict[str, int]:
        """{name: k}: parameters [k*H] that torch.nn's module has not, of one layer and direction."""
        return _options.vectors(self._plain_cell(), self._fused_options)

    def _new_vector(self, weight: Tensor, k: int) -> nn.Parameter:
        """[k*H], beside a weight and initialised as torch.nn initialises all of them."""
        bound = self.hidden_size**-0.5
        return nn.Parameter(weight.new_empty(k * self.hidden_size).uniform_(-bound, bound))

    def _split_heads(self, heads: int) -> None:
        """Every W_hh [G*H, H/n] in place of [G*H, H], the rows of a unit beside the units of its head."""
        for name, w_hh in list(self._parameters.items()):
            if w_hh is not None and name.startswith("weight_hh"):
                size, bound = self.hidden_size // heads, self.hidden_size**-0.5
                drawn = w_hh.detach().new_empty(len(w_hh), size).uniform_(-bound, bound)
                setattr(self, name, nn.Parameter(drawn))
        if isinstance(self, nn.RNNBase):
            self._init_flat_weights()

    def _keep_gates(self, gates: int) -> None:
        """The first ``gates`` blocks of H rows of each parameter, for cells with fewer than torch.nn's."""
        for name, parameter in list(self._parameters.items()):
            if parameter is not None and len(parameter) > gates * self.hidden_size:
                kept = parameter.detach()[: gates * self.hidden_size]
                setattr(self, name, nn.Parameter(kept.clone(memory_format=torch.contiguous_format)))

    def _initialise_options(self) -> None:
        for name, value in self._fused_options.items():
            if initialise := _options.OPTIONS[name].initialise:
                initialise(self, value)

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        self._initialise_options()

    def extra_repr(self) -> str:
        options = _options.text(self._fused_options)
        return super().extra_repr() + (f", {options}" if options else "")

    def _of_call(self, w_hh: Tensor) -> Tensor:
        """W_hh as this call takes it."""
        p = self._fused_options.get("weight_dropout", 0.0)
        return self._dense(dropout(w_hh, p) if p and self.training else w_hh)

    def _dense(self, w_hh: Tensor) -> Tensor:
        """W_hh [G*H, P], block-diagonal with heads."""
        heads = self._fused_options.get("heads", 1)
        return w_hh if heads == 1 else block_diagonal(w_hh, heads)

    def train(self, mode: bool = True):
        if mode:
            _prepack.undo(self, "train() was called")
        return super().train(mode)

    def _call_impl(self, *args, **keywords):
        input = args[0] if args else keywords.get("input")
        if isinstance(input, Proxy) and type(self).forward.__module__ == __name__:
            tracer = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, keywords)
        return super()._call_impl(*args, **keywords)

    def __prepare_scriptable__(self):  # torch.jit.script calls this first
        raise RuntimeError(
            f"fastrnn: torch.jit.script does not take a fastrnn.{_torch_name(self)}; "
            "call fastrnn.to_torch(model) first"
        )

    def __setattr__(self, name: str, value) -> None:
        if name == "qconfig":  # torch.ao.quantization gives every module one
            warn(
                "torch.ao.quantization goes by torch.nn's exact classes and leaves a "
                f"fastrnn.{_torch_name(self)} as it is; to quantize it, call fastrnn.to_torch(model) first"
            )
        super().__setattr__(name, value)


class _Recurrent(_Fused, nn.RNNBase):
    """forward() of all three, in the order and the words of torch.nn's."""

    _state_hooks: dict[int, functional.StateHook] | None = None
    _state_count = 1  # h, and what lives beside it

    def register_state_gradient_hook(self, hook: functional.StateHook) -> RemovableHandle:
        """Calls ``hook(gradients)`` whenever back-propagation passes a layer of this module, for forward
        calls made from now on. The argument is a ``functional.StateGradients``: the complete dL/dh_t
        [D, N, P], and dL/dc_t [D, N, H] of an LSTM, of every step, which the backward kernels compute anyway.
        The order is that of back-propagation: the last call first, and in each call the last layer first.

        Returns a handle whose ``remove()`` ends it. A call that takes no kernel of fastrnn, or is compiled,
        raises RuntimeError while there is a hook.
        """
        if self._state_hooks is None:
            self._state_hooks = OrderedDict()
        handle = RemovableHandle(self._state_hooks)
        self._state_hooks[handle.id] = hook
        return handle

    def _check_forward(self, input: Tensor, hx, batch_sizes: Tensor | None, dtype: torch.dtype) -> None:
        """torch.nn's checks; ``dtype`` is that of the weights, read by the caller, once a call."""
        if input.dtype != dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype}). "
                f"Convert input: input.to({dtype}), or convert model: model.to({input.dtype})"
            )
        self.check_forward_args(input, hx, batch_sizes)

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        if functional.is_recorded():  # torch.jit.trace warns of comparisons, torch.nn's excepted
            return super().check_input(input, batch_sizes)
        dims = 2 if batch_sizes is not None else 3
        if input.dim() != dims:
            raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
        if self.input_size != input.size(-1):
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {input.size(-1)}"
            )

    def _zeros(self, input: Tensor, B: int):
        LD = self.num_layers * (2 if self.bidirectional else 1)
        h = input.new_zeros(LD, B, self.proj_size or self.hidden_size)
        if self._state_count == 1:
            return h
        other = input.new_zeros(LD, B, self.hidden_size) if self.proj_size else h
        return h, *[other] * (self._state_count - 1)

    def _check_hidden_dims(self, hx, dims: int) -> None:
        kind = "batched 3-D" if dims == 3 else "unbatched 2-D"
        if self.mode == "LSTM":
            if hx[0].dim() != dims or hx[1].dim() != dims:
                raise RuntimeError(
                    f"For {kind} input, hx and cx should also be {dims}-D "
                    f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
                )
        elif hx.dim() != dims:
            raise RuntimeError(f"For {kind} input, hx should also be {dims}-D but got {hx.dim()}-D tensor")

    def _each(self, hx, f):
        return tuple(map(f, hx)) if self._state_count > 1 else f(hx)

    def _is_torchs(self) -> bool:
        """Whether torch.nn's module computes the same."""
        return not _options.beyond_torch(self._fused_options)

    def _records_torchs(self, input) -> bool:
        """Whether what is recorded of a call is torch.nn's. In ONNX it is a packed sequence's alone."""
        if not functional.becomes_a_node():
            return self._is_torchs()
        packed = isinstance(input, PackedSequence)
        if packed and torch.compiler.is_compiling():
            functional.refuse_onnx(functional.PACKED)
        return packed and self._is_torchs()

    def _weights(self) -> list[Tensor]:
        """``_flat_weights``, into which users may write as in torch.nn; after an attribute has changed, the
        attributes, as in torch.nn too. Each is read once, and nothing is flattened for cuDNN."""
        weights: list[Any] = []
        same, parameters = True, self._parameters
        for name, ref in zip(self._flat_weights_names, self._flat_weight_refs, strict=True):
            weight: Any = parameters.get(name)  # Module.__getattr__ takes three times as long
            if weight is None:
                weight = getattr(self, name, None)
            same = same and (weight is None or ref is None or ref() is weight)
            weights.append(weight)
        if same:
            return self._flat_weights  # type: ignore[return-value]
        if not (torch.compiler.is_compiling() or "parametrizations" in self._modules):
            self._flat_weights = weights
            self._flat_weight_refs = [None if w is None else weakref.ref(w) for w in weights]
        return weights

    def _plain_cell(self) -> str:
        return self.mode.lower()

    def _direct(self, input: Any, hx: Any):
        """The results of a plain call, or None."""
        if type(input) is not Tensor or input.dim() != 3 or self._fused_options or self._state_hooks:
            return None
        if self.num_layers > 1 and self.training and self.dropout:
            return None
        many = self._state_count > 1
        states = () if hx is None else hx if many else (hx,)
        form = self.num_layers, 2 if self.bidirectional else 1, self.batch_first
        found = _direct.run(self._plain_cell(), input, states, self._weights(), *form)
        return found if found is None or not many else (found[0], found[1:])

    def _add_vectors(self, vectors: dict[str, int]) -> None:
        for names in self._all_weights:  # of one layer and direction, the first one weight_ih
            suffix = names[0].removeprefix("weight_ih")
            for name, k in vectors.items():
                self.register_parameter(name + suffix, self._new_vector(getattr(self, names[0]), k))
                names.append(name + suffix)
        self._collect_weights()

    def _collect_weights(self) -> None:
        """``_flat_weights`` from ``_all_weights``, after these have changed."""
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()

    def flatten_parameters(self) -> None:
        """torch.nn's, for cuDNN, which has no use for cells and parameters of fastrnn's own."""
        if self._cell_name() == self._plain_cell() and "heads" not in self._fused_options:
            super().flatten_parameters()

    def _scan_layers(self) -> list[tuple[str, _autograd.Weights]]:
        """The cell and the weights of each layer."""
        cell = self._cell_name()
        weights, each = list(self._weights()), len(self._all_weights[0])
        weights[1::each] = map(self._dense, weights[1::each])
        layers = functional.stack_weights(cell, weights, self.bias, self.num_layers, self.bidirectional)
        return [(cell, functional.scan_weights(cell, weights)) for weights in layers]

    def _call(self, weights: list[Tensor], *args, **keywords):
        """The functional form, on (input, hx) or on (data, batch_sizes, hx)."""
        name = self.mode.lower()
        if self._fused_options:
            name, weights = self._cell_name(), list(weights)
            each = len(self._all_weights[0])  # of one layer and direction; the second one is weight_hh
            weights[1::each] = map(self._of_call, weights[1::each])
            keywords["acts"] = _options.on_states(self._fused_options)
        options = [self.bias, self.num_layers, self.dropout, self.training, self.bidirectional]
        if len(args) == 2:
            options.append(self.batch_first)
        if self._state_hooks:
            hooks = tuple(self._state_hooks.values())
            keywords["state_hook"] = lambda gradients: [hook(gradients) for hook in hooks]
        output, *hidden = functional._recurrent(name, (*args, weights, *options), **keywords)
        return output, tuple(hidden) if self._state_count > 1 else hidden[0]

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, lengths: Lengths | None = None,
        reset: Tensor | None = None, return_states: bool = False, reset_to: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]: ...

    def forward(self, input, hx=None, lengths=None, reset=None, return_states=False, reset_to=None):
        """torch.nn's (output, h_n), or (output, (h_n, c_n)) of an LSTM, and more when asked for.

        input [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence; hx is h_0
        [L*D, B, H] (LSTM: (h_0 [L*D, B, P], c_0 [L*D, B, H])), without B for unbatched input, zeros if None.

        lengths: integers [B] on any device, in any order, zeros allowed. Steps beyond a row's length do not
            happen: its output there is zero, and h_n, c_n are its states at its length.
        reset: bool [T, B] ([B, T] with batch_first): the state of a row is zeroed before that step.
        return_states: the second result is every h_t [T, L*D, B, P] (LSTM: and every c_t [T, L*D, B, H]),
            differentiable; ``h[t]`` is what hx takes.
        reset_to: with reset, the states in place of zero, as hx has them: the same at every step, or of each
            step, [T, L*D, B, P] (LSTM: and [T, L*D, B, H]); differentiable.

        Raises ValueError and RuntimeError where torch.nn does, in its words.
        """
        extended = lengths is not None or reset is not None or return_states or reset_to is not None
        if not isinstance(self, _Recurrent):
            return _torch_forward(self, input, hx)
        if not extended:
            if (done := self._direct(input, hx)) is not None:
                return done
            if functional.is_recorded() and self._records_torchs(input):
                return _torch_forward(self, input, hx)
        if isinstance(input, PackedSequence):
            if extended:
                raise ValueError(
                    "lengths, reset, reset_to and return_states take dense sequences, not packed ones"
                )
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            name, tensor = _torch_name(self), " tensor" if "RNN" in self.mode else ""
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D{tensor} instead")
        is_batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if not is_batched:
            input = input.unsqueeze(batch_dim)
            lengths = None if lengths is None else functional.as_lengths(lengths).reshape(1)
            reset = None if reset is None else reset.unsqueeze(batch_dim)
            if reset_to is not None:
                reset_to = tree_map_only(Tensor, lambda h: h.unsqueeze(-2), reset_to)
        if hx is None:
            hx = self._zeros(input, input.size(batch_dim))
        else:
            self._check_hidden_dims(hx, 3 if is_batched else 2)
            if not is_batched:
                hx = self._each(hx, lambda h: h.unsqueeze(1))
        weights = self._weights()
        self._check_forward(input, hx, None, weights[0].dtype)
        output, hidden = self._call(
            weights, input, hx, lengths=lengths, reset=reset, return_states=return_states, reset_to=reset_to
        )
        if not is_batched:
            of_batch = 2 if return_states else 1
            return output.squeeze(batch_dim), self._each(hidden, lambda h: h.squeeze(of_batch))
        return output, hidden

    def _forward_packed(self, input: PackedSequence, hx):
        data, batch_sizes, sorted_indices, unsorted_indices = input
        B = _rows_of_first_step(batch_sizes, hx)
        hx = self._zeros(data, B) if hx is None else self.permute_hidden(hx, sorted_indices)
        weights = self._weights()
        self._check_forward(data, hx, (B,), weights[0].dtype)  # type: ignore[arg-type]
        output, hidden = self._call(weights, data, batch_sizes, hx)
        packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self.permute_hidden(hidden, unsorted_indices)


class LSTM(_Recurrent, nn.LSTM):
    """Layers of an LSTM (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000):
    torch.nn.LSTM with fused kernels.

    At each step a layer computes, from its input x and its states h_prev and c_prev of the step before,

        i = sigmoid(W_ii x + b_ii + W_hi h_prev + b_hi)
        f = sigmoid(W_if x + b_if + W_hf h_prev + b_hf)
        g = tanh(W_ig x + b_ig + W_hg h_prev + b_hg)
        o = sigmoid(W_io x + b_io + W_ho h_prev + b_ho)
        c = f * c_prev + i * g
        h = o * tanh(c), or W_hr (o * tanh(c)) with a projection (Sak et al. 2014)

    Args:
        input_size: I, the width of x.
        hidden_size: H, the width of c, and of h without a projection.
        num_layers: L; the input of each layer but the first is the output of the layer before.
        bias: whether there are biases.
        batch_first: input and output are [B, T, *] instead of [T, B, *]; the states are not.
        dropout: the probability with which training zeroes an element of each layer's output but the last's.
        bidirectional: D = 2 directions, the second from the end of the sequence to its start, instead of 1.
        proj_size: P, the width of h with a projection; 0: P = H, without one.
        device, dtype: those of the parameters.

    Keyword Args:
        peephole: the gates see the cell's state, i and f the one before the step and o the one after it
            (Gers and Schmidhuber 2000): ``weight_ci * c_prev``, ``weight_cf * c_prev`` and ``weight_co * c``
            are added inside the three sigmoids. Parameters ``weight_ci_l{k}``, ``weight_cf_l{k}`` and
            ``weight_co_l{k}`` [H].
        coupled: i = 1 - f (Greff et al. 2017, "CIFG"), not together with peephole. Three gates, in the order
            f g o, so that 4*H is 3*H in the shapes below.
        layer_norm: layer normalisation (Ba et al. 2016, eq. 20-22): the gates' arguments are
            ``gain_ih * n(W_ih x) + b_ih + gain_hh * n(W_hh h_prev) + b_hh``, each n over all 4*H, and
            ``h = o * tanh(gain_c * n(c) + shift_c)``; c itself is carried as it is. n(v) is v less its mean,
            divided by its standard deviation (1e-5 is added to the variance). Parameters ``gain_ih_l{k}`` and
            ``gain_hh_l{k}`` [4*H], ``gain_c_l{k}`` and ``shift_c_l{k}`` [H], ones and zeros at first. Not
            with proj_size, peephole or coupled.
        weight_dropout: p in [0, 1), DropConnect (Merity et al. 2018): in training each element of every
            ``weight_hh_l{k}`` is zero with probability p, the others are divided by 1 - p; one mask a call,
            the same in all steps.
        zoneout: p or (p_h, p_c) in [0, 1) (Krueger et al. 2017): with probability p a unit of the state
            keeps its value of the step before, ``d * c_prev + (1 - d) * c`` with d drawn anew at every step,
            h likewise, which is computed from the c that no unit has kept. In evaluation d is p.
        recurrent_dropout: p in [0, 1), of the candidate (Semeniuta et al. 2016): in training
            c = f * c_prev + i * m * g, with m 0 with probability p or 1 / (1 - p), a new mask [B, H] a step.
        variational_dropout: p or (p_x, p_h) in [0, 1) (Gal and Ghahramani 2016): in training each layer sees
            m_x * x, and W_hh sees m_h * h_prev, elements of m being 0 with probability p or 1 / (1 - p);
            masks [B, I] and [B, P], the same in all steps of a call and for all gates, m_x also for both
            directions.
        cell_clip: v > 0, c is clipped to [-v, v] after its update, before o and h see it (Sak et al. 2014).
        state_gradient_clip: v > 0, in back-propagation dL/dh_t and dL/dc_t, each with the contributions of
            all later steps, are clipped to [-v, v] at every step; the states are those that return_states
            gives. Graves (2013) clips the gradients of an LSTM's gates in this way.
        heads: n that divides H, without proj_size: W_hh is block-diagonal, each gate of a unit sees the H/n
            units of its own head (Beck et al. 2024). ``weight_hh_l{k}`` is [4*H, H/n], in the order of the
            units. The kernels run on the [4*H, H] that each call makes of it.
        reverse: the one direction runs from each row's end to its start, as the second of a bidirectional
            layer, with the names of the first; h_n, c_n are the states at the start. Not with bidirectional.
        memory: what training keeps beside x: "store", everything that back-propagation needs, or "recompute",
            the states of every k-th step, from which back-propagation scans k steps at a time once more: the
            same gradients, in about 1.4 times the time. k is 4 sqrt(T), or the number given in place of
            "recompute". Under torch.compile, torch.func and forward mode everything is stored, and what
            derives the gradients again stores all steps meanwhile.
        forget_bias: v, initialisation only, also by ``reset_parameters()``: the forget gate's part of every
            ``bias_ih_l{k}`` is v, that of ``bias_hh_l{k}`` 0 (``fastrnn.init.forget_bias_``).

    Inputs: x, (h_0, c_0), and ``lengths``, ``reset``, ``reset_to`` and ``return_states`` as in ``forward``.
        x: [T, B, I], [B, T, I] with batch_first, [T, I] without a batch, or a PackedSequence.
        h_0, c_0: [L*D, B, P] and [L*D, B, H], without B if x has none; zeros if left out.

    Outputs: y, (h_n, c_n).
        y: [T, B, D*P], h of the last layer at every step, in the form of x; the two directions side by side.
        h_n, c_n: [L*D, B, P] and [L*D, B, H], the states after each row's last step.

    Parameters of layer k, with the suffix ``_reverse`` for the second direction; gates in the order i f g o.
        weight_ih_l{k}: [4*H, I], from the second layer on [4*H, D*P].
        weight_hh_l{k}: [4*H, P].
        bias_ih_l{k}, bias_hh_l{k}: [4*H], with bias.
        weight_hr_l{k}: [P, H], with a projection.
        All are drawn uniformly from [-1/sqrt(H), 1/sqrt(H)].

    Raises:
        ValueError: hidden_size or num_layers below 1, dropout outside [0, 1], proj_size outside [0, H); input
            that is neither 2-D nor 3-D, or of another dtype than the parameters.
        RuntimeError: input or states of other sizes than above.

    Example:
        >>> import fastrnn, torch
        >>> lstm = fastrnn.LSTM(8, 16, num_layers=2)
        >>> x = torch.randn(20, 3, 8)  # [T, B, I]
        >>> y, (h_n, c_n) = lstm(x)
        >>> y.shape, h_n.shape
        (torch.Size([20, 3, 16]), torch.Size([2, 3, 16]))
        >>> y, (h_n, c_n) = lstm(x[:1], (h_n, c_n))  # one more step
    """

    _state_count = 2

    def __init__(
        self,
        *args: Any,
        peephole: bool = False,
        coupled: bool = False,
        layer_norm: bool = False,
        weight_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        variational_dropout: float | tuple[float, float] = 0.0,
        cell_clip: float | None = None,
        state_gradient_clip: float | None = None,
        heads: int = 1,
        reverse: bool = False,
        memory: str | int = "store",
        forget_bias: float | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(*args, **keywords)
        self._set_options(
            peephole=peephole,
            coupled=coupled,
            layer_norm=layer_norm,
            weight_dropout=weight_dropout,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            variational_dropout=variational_dropout,
            cell_clip=cell_clip,
            state_gradient_clip=state_gradient_clip,
            heads=heads,
            reverse=reverse,
            memory=memory,
            forget_bias=forget_bias,
        )

    if TYPE_CHECKING:

        @overload  # type: ignore[override, no-overload-impl]
        def forward(
            self, input: Tensor, hx: _States | None = None, lengths: Lengths | None = None,
            reset: Tensor | None = None, return_states: bool = False, reset_to: _States | None = None,
        ) -> tuple[Tensor, _States]: ...  # fmt: skip
        @overload
        def forward(
            self, input: PackedSequence, hx: _States | None = None
        ) -> tuple[PackedSequence, _States]: ...


class GRU(_Recurrent, nn.GRU):
    """Layers of a GRU (Cho et al. 2014, the reset gate after the product): torch.nn.GRU with fused kernels.

    At each step a layer computes, from its input x and its state h_prev of the step before,

        r = sigmoid(W_ir x + b_ir + W_hr h_prev + b_hr)
        z = sigmoid(W_iz x + b_iz + W_hz h_prev + b_hz)
        n = tanh(W_in x + b_in + r * (W_hn h_prev + b_hn))
        h = (1 - z) * n + z * h_prev

    Args:
        input_size: I, the width of x.
        hidden_size: H, the width of h.
        num_layers: L; the input of each layer but the first is the output of the layer before.
        bias: whether there are biases.
        batch_first: input and output are [B, T, *] instead of [T, B, *]; the state is not.
        dropout: the probability with which training zeroes an element of each layer's output but the last's.
        bidirectional: D = 2 directions, the second from the end of the sequence to its start, instead of 1.
        device, dtype: those of the parameters.

    Keyword Args:
        layer_norm: layer normalisation of the two products (Ba et al. 2016): ``gain_ih * n(W_ih x)`` and
            ``gain_hh * n(W_hh h_prev)`` in the place of ``W_ih x`` and ``W_hh h_prev`` above, each n over all
            3*H as for ``LSTM``. Parameters ``gain_ih_l{k}`` and ``gain_hh_l{k}`` [3*H], ones at first.
            Not with recurrent_dropout.
        weight_dropout, variational_dropout: as for ``LSTM``.
        zoneout: p in [0, 1) (Krueger et al. 2017): with probability p a unit keeps h of the step before,
            drawn anew at every step, ``d * h_prev + (1 - d) * h``; in evaluation d is p.
        recurrent_dropout: p in [0, 1), of the candidate (Semeniuta et al. 2016): in training
            h = (1 - z) * m * n + z * h_prev, with m 0 with probability p or 1 / (1 - p), a new mask a step.
        state_gradient_clip, heads, reverse, memory: as for ``LSTM``; with heads ``weight_hh_l{k}`` is
            [3*H, H/n].

    Inputs: x, h_0, and ``lengths``, ``reset``, ``reset_to`` and ``return_states`` as in ``forward``.
        x: [T, B, I], [B, T, I] with batch_first, [T, I] without a batch, or a PackedSequence.
        h_0: [L*D, B, H], without B if x has none; zeros if left out.

    Outputs: y, h_n.
        y: [T, B, D*H], h of the last layer at every step, in the form of x; the two directions side by side.
        h_n: [L*D, B, H], the state after each row's last step.

    Parameters of layer k, with the suffix ``_reverse`` for the second direction; gates in the order r z n.
        weight_ih_l{k}: [3*H, I], from the second layer on [3*H, D*H].
        weight_hh_l{k}: [3*H, H].
        bias_ih_l{k}, bias_hh_l{k}: [3*H], with bias.
        All are drawn uniformly from [-1/sqrt(H), 1/sqrt(H)].

    Raises:
        ValueError: hidden_size or num_layers below 1, dropout outside [0, 1]; input that is neither 2-D nor
            3-D, or of another dtype than the parameters.
        RuntimeError: input or state of other sizes than above.

    Example:
        >>> import fastrnn, torch
        >>> gru = fastrnn.GRU(8, 16, bidirectional=True, batch_first=True)
        >>> x = torch.randn(3, 20, 8)  # [B, T, I]
        >>> y, h_n = gru(x, lengths=torch.tensor([20, 7, 11]))
        >>> y.shape, h_n.shape
        (torch.Size([3, 20, 32]), torch.Size([2, 3, 16]))
        >>> bool(y[1, 7:].eq(0).all())  # beyond the length
        True
    """

    def __init__(
        self,
        *args: Any,
        layer_norm: bool = False,
        weight_dropout: float = 0.0,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        variational_dropout: float | tuple[float, float] = 0.0,
        state_gradient_clip: float | None = None,
        heads: int = 1,
        reverse: bool = False,
        memory: str | int = "store",
        **keywords: Any,
    ) -> None:
        super().__init__(*args, **keywords)
        self._set_options(
            layer_norm=layer_norm,
            weight_dropout=weight_dropout,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            variational_dropout=variational_dropout,
            state_gradient_clip=state_gradient_clip,
            heads=heads,
            reverse=reverse,
            memory=memory,
        )


class RNN(_Recurrent, nn.RNN):
    """Layers of a simple recurrent network (Elman 1990): torch.nn.RNN with fused kernels.

    At each step a layer computes, from its input x and its state h_prev of the step before,

        h = tanh(W_ih x + b_ih + W_hh h_prev + b_hh), with relu in place of tanh if asked for

    Args:
        input_size: I, the width of x.
        hidden_size: H, the width of h.
        num_layers: L; the input of each layer but the first is the output of the layer before.
        nonlinearity: "tanh" or "relu".
        bias: whether there are biases.
        batch_first: input and output are [B, T, *] instead of [T, B, *]; the state is not.
        dropout: the probability with which training zeroes an element of each layer's output but the last's.
        bidirectional: D = 2 directions, the second from the end of the sequence to its start, instead of 1.
        device, dtype: those of the parameters.

    Keyword Args:
        weight_dropout, variational_dropout: as for ``LSTM``.
        zoneout: p, as for ``GRU``.
        state_gradient_clip, heads, reverse, memory: as for ``LSTM``; with heads ``weight_hh_l{k}`` is
            [H, H/n].

    Inputs: x, h_0, and ``lengths``, ``reset``, ``reset_to`` and ``return_states`` as in ``forward``.
        x: [T, B, I], [B, T, I] with batch_first, [T, I] without a batch, or a PackedSequence.
        h_0: [L*D, B, H], without B if x has none; zeros if left out.

    Outputs: y, h_n.
        y: [T, B, D*H], h of the last layer at every step, in the form of x; the two directions side by side.
        h_n: [L*D, B, H], the state after each row's last step.

    Parameters of layer k, with the suffix ``_reverse`` for the second direction.
        weight_ih_l{k}: [H, I], from the second layer on [H, D*H].
        weight_hh_l{k}: [H, H].
        bias_ih_l{k}, bias_hh_l{k}: [H], with bias.
        All are drawn uniformly from [-1/sqrt(H), 1/sqrt(H)].

    Raises:
        ValueError: hidden_size or num_layers below 1, dropout outside [0, 1], another nonlinearity; input
            that is neither 2-D nor 3-D, or of another dtype than the parameters.
        RuntimeError: input or state of other sizes than above.

    Example:
        >>> import fastrnn, torch
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> rnn = fastrnn.RNN(8, 16, nonlinearity="relu")
        >>> x = pack_sequence([torch.randn(5, 8), torch.randn(3, 8)])
        >>> y, h_n = rnn(x)
        >>> y.data.shape, h_n.shape
        (torch.Size([8, 16]), torch.Size([1, 2, 16]))
    """

    def __init__(
        self,
        *args: Any,
        weight_dropout: float = 0.0,
        zoneout: float = 0.0,
        variational_dropout: float | tuple[float, float] = 0.0,
        state_gradient_clip: float | None = None,
        heads: int = 1,
        reverse: bool = False,
        memory: str | int = "store",
        **keywords: Any,
    ) -> None:
        super().__init__(*args, **keywords)
        self._set_options(
            weight_dropout=weight_dropout,
            zoneout=zoneout,
            variational_dropout=variational_dropout,
            state_gradient_clip=state_gradient_clip,
            heads=heads,
            reverse=reverse,
            memory=memory,
        )


_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _RecurrentCell(_Fused, nn.RNNCellBase):
    """forward() of the cells, in the order and the words of torch.nn's."""

    _cell: str

    def _plain_cell(self) -> str:
        return f"rnn_{self.nonlinearity}" if isinstance(self, nn.RNNCell) else self._cell

    def _add_vectors(self, vectors: dict[str, int]) -> None:
        for name, k in vectors.items():
            self.register_parameter(name, self._new_vector(self.weight_ih, k))

    def _scan_layers(self) -> list[tuple[str, _autograd.Weights]]:
        """The cell and the weights of its one layer."""
        cell = self._cell_name()
        weights = functional.slots(cell, *self._weights(self._dense(self.weight_hh)))
        return [(cell, functional.scan_weights(cell, weights))]

    def _weights(self, w_hh: Tensor) -> tuple:
        """As functional._cell takes them."""
        vectors = [getattr(self, name) for name in self._vectors()] if self._fused_options else ()
        return self.weight_ih, w_hh, self.bias_ih, self.bias_hh, *vectors

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """input [B, I] or [I], hx [B, H] or [H], zeros if None -> h; of an LSTMCell hx = (h, c) -> (h, c)."""
        if not isinstance(self, _RecurrentCell):
            return _torch_forward(self, input, hx)
        many = isinstance(self, nn.LSTMCell)
        if not self._fused_options and type(input) is Tensor and input.dim() == 2:
            p, states = self._parameters, () if hx is None else hx if many else (hx,)
            names = _CELL_WEIGHTS if self.bias else _CELL_WEIGHTS[:2]
            done = _direct.run(self._plain_cell(), input, states, [p.get(name) for name in names])
            if done is not None:
                return done if many else done[0]
        if isinstance(self, nn.RNNCell) and self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        if input.dim() not in (1, 2):
            raise ValueError(
                f"{_torch_name(self)}: Expected input to be 1D or 2D, got {input.dim()}D instead"
            )
        hidden = () if hx is None else tuple(hx) if many else (hx,)
        for i, h in enumerate(hidden):
            if h.dim() not in (1, 2):
                which = f"hx[{i}]" if many else "hidden"
                name = _torch_name(self)
                raise ValueError(f"{name}: Expected {which} to be 1D or 2D, got {h.dim()}D instead")
        is_batched = input.dim() == 2
        if not is_batched:
            input, hidden = input.unsqueeze(0), tuple(h.unsqueeze(0) for h in hidden)
        if hx is None:
            zeros = input.new_zeros(input.size(0), self.hidden_size)
            hidden = (zeros, zeros) if many else (zeros,)
        name, weight_hh = self._plain_cell(), self.weight_hh
        acts: dict[str, Any] = {}
        if self._fused_options:
            name, weight_hh = self._cell_name(), self._of_call(weight_hh)
            acts = _options.on_states(self._fused_options)
        weights = self._weights(weight_hh)
        out = functional._cell(
            name, input, hidden if many else hidden[0], *weights, acts=acts, train=self.training
        )
        if is_batched:
            return out
        return tuple(h.squeeze(0) for h in out) if many else out.squeeze(0)


class LSTMCell(_RecurrentCell, nn.LSTMCell):
    """One step of an LSTM (Hochreiter and Schmidhuber 1997, Gers et al. 2000): torch.nn.LSTMCell, fused.

        i = sigmoid(W_ii x + b_ii + W_hi h_prev + b_hi)
        f = sigmoid(W_if x + b_if + W_hf h_prev + b_hf)
        g = tanh(W_ig x + b_ig + W_hg h_prev + b_hg)
        o = sigmoid(W_io x + b_io + W_ho h_prev + b_ho)
        c = f * c_prev + i * g
        h = o * tanh(c)

    Args:
        input_size: I, the width of x.
        hidden_size: H, the width of h and c.
        bias: whether there are biases.
        device, dtype: those of the parameters.

    Options, keyword-only: peephole, coupled, layer_norm, weight_dropout, zoneout, recurrent_dropout,
        cell_clip, state_gradient_clip, heads and forget_bias as for ``LSTM``, each call being one step, with
        parameters without suffix; with heads ``weight_hh`` is [4*H, H/n].

    Inputs: x, (h_prev, c_prev).
        x: [B, I], or [I] without a batch.
        h_prev, c_prev: [B, H], or [H]; zeros if left out.

    Output: (h, c), of the shapes of h_prev and c_prev.

    Parameters, gates in the order i f g o:
        weight_ih: [4*H, I].
        weight_hh: [4*H, H].
        bias_ih, bias_hh: [4*H], with bias.
        All are drawn uniformly from [-1/sqrt(H), 1/sqrt(H)].

    Raises:
        ValueError: input or states of other than one or two dimensions.
        RuntimeError: input or states of other sizes than above.

    Example:
        >>> import fastrnn, torch
        >>> cell = fastrnn.LSTMCell(8, 16)
        >>> states = None
        >>> for x in torch.randn(20, 3, 8):  # [B, I] of each step
        ...     states = cell(x, states)
        >>> h, c = states
        >>> h.shape, c.shape
        (torch.Size([3, 16]), torch.Size([3, 16]))
    """

    _cell = "lstm"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        peephole: bool = False,
        coupled: bool = False,
        layer_norm: bool = False,
        weight_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        cell_clip: float | None = None,
        state_gradient_clip: float | None = None,
        heads: int = 1,
        forget_bias: float | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self._set_options(
            peephole=peephole,
            coupled=coupled,
            layer_norm=layer_norm,
            weight_dropout=weight_dropout,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            cell_clip=cell_clip,
            state_gradient_clip=state_gradient_clip,
            heads=heads,
            forget_bias=forget_bias,
        )

    if TYPE_CHECKING:

        def forward(self, input: Tensor, hx: _States | None = None) -> _States: ...


class GRUCell(_RecurrentCell, nn.GRUCell):
    """One step of a GRU (Cho et al. 2014): torch.nn.GRUCell, fused.

        r = sigmoid(W_ir x + b_ir + W_hr h_prev + b_hr)
        z = sigmoid(W_iz x + b_iz + W_hz h_prev + b_hz)
        n = tanh(W_in x + b_in + r * (W_hn h_prev + b_hn))
        h = (1 - z) * n + z * h_prev

    Args:
        input_size: I, the width of x.
        hidden_size: H, the width of h.
        bias: whether there are biases.
        device, dtype: those of the parameters.

    Options, keyword-only: layer_norm, weight_dropout, zoneout, recurrent_dropout, state_gradient_clip and
        heads as for ``GRU``, each call being one step, with parameters without suffix; with heads
        ``weight_hh`` is [3*H, H/n].

    Inputs: x, h_prev.
        x: [B, I], or [I] without a batch.
        h_prev: [B, H], or [H]; zeros if left out.

    Output: h, of the shape of h_prev.

    Parameters, gates in the order r z n:
        weight_ih: [3*H, I].
        weight_hh: [3*H, H].
        bias_ih, bias_hh: [3*H], with bias.
        All are drawn uniformly from [-1/sqrt(H), 1/sqrt(H)].

    Raises:
        ValueError: input or state of other than one or two dimensions.
        RuntimeError: input or state of other sizes than above.

    Example:
        >>> import fastrnn, torch
        >>> cell = fastrnn.GRUCell(8, 16)
        >>> h = None
        >>> for x in torch.randn(20, 3, 8):  # [B, I] of each step
        ...     h = cell(x, h)
        >>> h.shape
        torch.Size([3, 16])
    """

    _cell = "gru"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        layer_norm: bool = False,
        weight_dropout: float = 0.0,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        state_gradient_clip: float | None = None,
        heads: int = 1,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self._set_options(
            layer_norm=layer_norm,
            weight_dropout=weight_dropout,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            state_gradient_clip=state_gradient_clip,
            heads=heads,
        )

    if TYPE_CHECKING:

        def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...


class RNNCell(_RecurrentCell, nn.RNNCell):
    """One step of a simple recurrent network (Elman 1990): torch.nn.RNNCell, fused.

        h = tanh(W_ih x + b_ih + W_hh h_prev + b_hh), with relu in place of tanh if asked for

    Args:
        input_size: I, the width of x.
        hidden_size: H, the width of h.
        bias: whether there are biases.
        nonlinearity: "tanh" or "relu".
        device, dtype: those of the parameters.

    Options, keyword-only: weight_dropout, zoneout, state_gradient_clip and heads as for ``RNN``, each call
        being one step; with heads ``weight_hh`` is [H, H/n].

    Inputs: x, h_prev.
        x: [B, I], or [I] without a batch.
        h_prev: [B, H], or [H]; zeros if left out.

    Output: h, of the shape of h_prev.

    Parameters:
        weight_ih: [H, I].
        weight_hh: [H, H].
        bias_ih, bias_hh: [H], with bias.
        All are drawn uniformly from [-1/sqrt(H), 1/sqrt(H)].

    Raises:
        ValueError: input or state of other than one or two dimensions.
        RuntimeError: input or state of other sizes than above, another nonlinearity.

    Example:
        >>> import fastrnn, torch
        >>> cell = fastrnn.RNNCell(8, 16, nonlinearity="relu")
        >>> cell(torch.randn(3, 8)).shape
        torch.Size([3, 16])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device=None,
        dtype=None,
        *,
        weight_dropout: float = 0.0,
        zoneout: float = 0.0,
        state_gradient_clip: float | None = None,
        heads: int = 1,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, nonlinearity, device, dtype)
        self._set_options(
            weight_dropout=weight_dropout,
            zoneout=zoneout,
            state_gradient_clip=state_gradient_clip,
            heads=heads,
        )

    if TYPE_CHECKING:

        def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...
