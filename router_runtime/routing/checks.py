"""What a call or a configuration may contain: one check for each, shared by every op.

Those of tensors run on every call, so each reads a few attributes only; messages are built on
failure.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from router_runtime.errors import InputError, explain
from router_runtime.format.scoring import SCORINGS, TEMPERATURES, is_temperature

MAX_EXPERTS = 1024
MAX_TOP_K = 32
MAX_SCALE = 1e18
#: Of ``topk_select`` and ``topk_indices``.
MAX_SELECTED = 4096
MAX_ROW_LENGTH = 2**21

#: What logits, and the biases beside them, may be; fp32 holds all of their values.
LOGITS = (torch.float32, torch.bfloat16, torch.float16)
_LOGITS = "torch.float32, torch.bfloat16 or torch.float16"

#: The dense kernels read rows in 16-byte pieces.
_ALIGNMENT = 16


class NoMemory(InputError):
    """A tensor that has no memory of its own, as inside of a transformation of ``torch.func``."""

    def __init__(self, name: str) -> None:
        super().__init__(
            explain(
                name,
                expected="a tensor with values in memory",
                found="one that stands for a tensor while torch traces a function",
                remedy="call the router or its op with the tensor itself",
            )
        )


def check_activations(tensor: Tensor, hidden_size: int, device: torch.device) -> int:
    """The number of tokens. Raises InputError for anything but bf16 ``[tokens, hidden_size]`` on
    the router's device, and for a tensor that requires grad in grad mode.
    """
    shape = tensor.shape
    if (
        tensor.dtype is not torch.bfloat16
        or len(shape) != 2
        or shape[1] != hidden_size
        or tensor.device != device
    ):
        raise wrong_tensor(
            "hidden_states",
            f"torch.bfloat16 [tokens, {hidden_size}] on {device}",
            tensor,
        )
    if tensor.requires_grad or forward_ad._current_level >= 0:
        refuse_grad("hidden_states", tensor)
    return shape[0]


def check_token_ids(tensor: Tensor, device: torch.device, tokens: int | None = None) -> int:
    """The number of tokens. Raises InputError for anything but int32 or int64 ``[tokens]`` on the
    router's device, and for another number of tokens than ``tokens``, unless that is None.
    """
    dtype, shape = tensor.dtype, tensor.shape
    if (
        (dtype is not torch.int64 and dtype is not torch.int32)
        or len(shape) != 1
        or tensor.device != device
        or (tokens is not None and shape[0] != tokens)
    ):
        count = "tokens" if tokens is None else tokens
        raise wrong_tensor("token_ids", f"torch.int32 or torch.int64 [{count}] on {device}", tensor)
    return shape[0]


def check_scores(scores: Tensor) -> None:
    """Raise InputError for anything but fp32 ``[rows, columns]`` without grad."""
    if scores.dtype is not torch.float32 or scores.dim() != 2:
        raise wrong_tensor("scores", "torch.float32 [rows, columns]", scores)
    refuse_grad("scores", scores)


def check_score_rows(scores: Tensor) -> None:
    """Raise InputError for anything but fp32 or bf16 ``[rows, columns]`` without grad."""
    if scores.dtype not in (torch.float32, torch.bfloat16) or scores.dim() != 2:
        raise wrong_tensor("scores", "torch.float32 or torch.bfloat16 [rows, columns]", scores)
    refuse_grad("scores", scores)


def check_logits(logits: Tensor) -> None:
    """Raise InputError for anything but fp32, bf16 or fp16 ``[tokens, experts]`` without grad."""
    if logits.dtype not in LOGITS or logits.dim() != 2:
        raise wrong_tensor("logits", f"{_LOGITS} [tokens, experts]", logits)
    refuse_grad("logits", logits)


def check_logits_bias(name: str, bias: Tensor, logits: Tensor) -> None:
    """Raise InputError for anything but fp32, bf16 or fp16 ``[experts]`` where the logits are,
    without grad.
    """
    if (
        bias.dtype not in LOGITS
        or bias.dim() != 1
        or bias.shape[0] != logits.shape[1]
        or bias.device != logits.device
    ):
        expected = f"{_LOGITS} [{logits.shape[1]}] on {logits.device}"
        raise wrong_tensor(name, expected, bias)
    refuse_grad(name, bias)


def check_int(name: str, value: object, low: int, high: int) -> None:
    """Raise InputError for a value that is not an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise wrong_value(name, f"an integer from {low} to {high}", value)


def check_scale(name: str, value: object) -> None:
    """Raise InputError for a scale of the weights that is not a number in [0, 1e18]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_SCALE:
        raise wrong_value(name, f"a number from 0 to {MAX_SCALE:g}", value)


def check_scoring(name: str, value: object) -> None:
    """Raise InputError for a scoring function that there is not."""
    if not isinstance(value, str) or value not in SCORINGS:
        raise wrong_value(name, f"one of {list(SCORINGS)}", value)


def check_temperature(name: str, value: object) -> None:
    """Raise InputError for a gate temperature that no kernel is built for."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not is_temperature(value):
        low, high = TEMPERATURES
        raise wrong_value(name, f"a number from {low:g} to {high:g}", value)


def refuse_grad(name: str, tensor: Tensor) -> None:
    """Raise InputError for a tensor that requires grad in grad mode, or that has a tangent of
    forward-mode differentiation: no op has a derivative, and a silent zero would be wrong.
    """
    if tensor.requires_grad and torch.is_grad_enabled():
        raise InputError(
            explain(
                name,
                expected="a tensor that needs no gradient",
                found="requires_grad=True in grad mode",
                remedy="call under torch.no_grad() or torch.inference_mode(), or detach it",
            )
        )
    # Looked up only inside of forward-mode differentiation, because it takes long.
    if forward_ad._current_level < 0:
        return
    if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        raise InputError(
            explain(
                name,
                expected="a tensor without a tangent",
                found="one of forward-mode differentiation, such as torch.func.jvp",
                remedy="call it outside of what is differentiated, or detach it",
            )
        )


def readable_rows(tensor: Tensor) -> tuple[Tensor, int, int]:
    """bf16 rows that the dense kernels can read: ``(tensor, address, row stride)``.

    ``tensor`` itself if the elements of a row are adjacent and every row starts at a multiple of 16
    bytes, else a contiguous copy.
    """
    address = tensor.data_ptr()
    if not address:
        raise NoMemory("hidden_states")
    row_stride, stride = tensor.stride()
    if stride == 1 and not (address | row_stride * 2) % _ALIGNMENT:
        return tensor, address, row_stride
    copy = tensor.clone(memory_format=torch.contiguous_format)
    return copy, copy.data_ptr(), copy.shape[1]


def address(tensor: Tensor | None, dtype: torch.dtype, row: int = 0) -> int:
    """The address of a row of ``tensor`` if it is of that dtype, else null."""
    if tensor is None or tensor.dtype is not dtype:
        return 0
    return tensor.data_ptr() + (row * tensor.stride(0) * tensor.element_size() if row else 0)


def wrong_tensor(name: str, expected: str, tensor: object) -> InputError:
    """The error for a tensor of the wrong kind."""
    if isinstance(tensor, Tensor):
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
    else:  # such as a NumPy array, which has a dtype and a shape too
        found = f"{type(tensor).__module__}.{type(tensor).__name__}"
    return InputError(
        explain(name, expected=expected, found=found, remedy="convert, reshape or move it")
    )


def wrong_token_ids(mode: str, given: bool) -> InputError:
    """The error for token ids in a mode that takes none, or for missing ones."""
    return wrong_value(
        "token_ids",
        "token ids beside the rows in mode 'hash_gate', and in no other",
        f"{'token ids' if given else 'no token ids'} in mode {mode!r}",
    )


def wrong_value(name: str, expected: object, found: object) -> InputError:
    """The error for an argument of the wrong value."""
    return InputError(
        explain(name, expected=expected, found=repr(found), remedy="correct the argument")
    )
