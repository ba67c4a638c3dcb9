"""What the runtime raises, and the one form its messages take: expected, found, next command."""

from __future__ import annotations

#: The distribution of this package. A wheel for some targets only appends their names: ``-sm90a``.
DISTRIBUTION = "dsv4-router-runtime"


class RouterRuntimeError(RuntimeError):
    """The base of every error that the runtime raises on purpose."""


class FormatError(RouterRuntimeError, ValueError):
    """A manifest, a contract, a release file or a record that the format does not allow."""


class ArtifactError(RouterRuntimeError):
    """The artifacts folder or one of its files is missing, altered or not what a kernel needs."""


class TrustError(ArtifactError):
    """A file lacks the signature that this process requires, or the requirement is wrong."""


class DriverError(RouterRuntimeError):
    """The NVIDIA driver is missing, too old, or a call to it failed."""


#: Optional part of this package -> what it needs: the extras of pyproject.toml.
EXTRAS = {
    "signature": "cryptography>=42",
    "safetensors": "safetensors>=0.4",
    "transformers": "transformers>=5.23",
    "vllm": "vllm>=0.24,<0.34",
    "sglang": "sglang>=0.5.23,<0.6",
}


class ResolutionError(RouterRuntimeError):
    """No kernel of the manifest serves the request on this device."""


class InputError(RouterRuntimeError, ValueError):
    """A configuration, a weight, an activation or an argument that is refused."""


def explain(what: str, *, expected: object, found: object, remedy: str) -> str:
    """The text of an error: ``what``, what was expected, what was found, what to do next."""
    return f"{what}: expected {expected}, found {found}; {remedy}"


def install_extra(name: str) -> str:
    """The command that installs what an optional part of this package needs.

    It names the needed package and not this distribution: a package index may have somebody else's
    distribution of that name.
    """
    return f"run: pip install '{EXTRAS[name]}'"
