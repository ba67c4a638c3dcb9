"""The software bill of materials of a release, in CycloneDX, with nothing random in it.

Components: every cubin by digest, what the runtime needs, and the toolchain, which is not shipped
(scope ``excluded``). The library adds a random serial number and the time; the format requires
neither, and both are taken out. The library is of ``release.lock``: it is imported where it is
used, so that a build does without it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from build_kernels.release.wheel import Project
from router_runtime.format.manifest import Manifest

if TYPE_CHECKING:
    from cyclonedx.model.component import Component


def dumps(project: Project, distribution: str, manifest: Manifest) -> bytes:
    """Return the canonical bytes of the bill of materials of one wheel."""
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentScope, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    wheel = Component(
        name=distribution,
        version=project.version,
        type=ComponentType.LIBRARY,
        bom_ref=distribution,
        purl=PackageURL("pypi", None, distribution, project.version),
        licenses=[LicenseFactory().make_from_string(project.license)],
    )
    cubins = [
        Component(
            name=entry.file,
            type=ComponentType.FILE,
            bom_ref=entry.file,
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=entry.sha256)],
        )
        for entry in manifest.entries
    ]
    toolchain = [
        Component(
            name=name,
            version=version,
            type=ComponentType.LIBRARY,
            scope=ComponentScope.EXCLUDED,
            bom_ref=f"toolchain/{name}",
            purl=PackageURL("pypi", None, name, version),
        )
        for name, version in manifest.toolchain.packages.items()
    ]
    bom = Bom()
    bom.metadata.component = wheel
    needed = _requirements(project.requirements)
    bom.components.update(cubins, needed, toolchain)
    bom.register_dependency(wheel, [*cubins, *needed])
    for cubin in cubins:
        bom.register_dependency(cubin, toolchain)
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    del document["serialNumber"], document["metadata"]["timestamp"]
    text = json.dumps(document, sort_keys=True, indent=1, allow_nan=False)
    return text.encode("ascii") + b"\n"


def _requirements(texts: Sequence[str]) -> list[Component]:
    """What an installer of the wheel has to provide: a name and a range, not one version."""
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL
    from packaging.requirements import Requirement

    return [
        Component(
            name=requirement.name,
            type=ComponentType.LIBRARY,
            bom_ref=f"runtime/{requirement.name}",
            description=str(requirement),
            purl=PackageURL("pypi", None, requirement.name),
        )
        for requirement in map(Requirement, texts)
    ]
