"""Whether the CUDA library runs on a GPU and its driver, from what all say of themselves.

Nothing here touches a GPU: a context on each would take hundreds of megabytes.
"""

from __future__ import annotations

from ._toolchain import release


def code_for(built: str, capability: tuple[int, int]) -> str:
    """Which code for architectures such as ``"80 90 100+PTX"`` runs on a compute capability.

    ``"machine"`` code runs on its generation from its own revision on; ``"PTX"``, which the driver
    compiles, on everything later. Empty where neither does.
    """
    translated = ""
    for word in built.split():
        number = int(word.removesuffix("+PTX").rstrip("af"))
        major, minor = divmod(number, 10)
        if major == capability[0] and minor <= capability[1]:
            return "machine"
        if word.endswith("+PTX") and (major, minor) <= capability:
            translated = "PTX"
    return translated


def why_not(built: dict[str, str], driver: str, capability: tuple[int, int], name: str) -> str:
    """Why the library does not run on a GPU; empty if it does.

    A driver runs machine code of its own major version of CUDA and of older ones; it compiles PTX
    of no toolkit that is newer than itself.
    """
    code = code_for(built["architectures"], capability)
    if not code:
        return (
            f"kdkernels._cuda was built for {built['architectures']}, and {name} is {capability}: "
            f"build with KDKERNELS_CUDA_ARCHS={capability[0]}{capability[1]}"
        )
    toolkit, known = release(built["CUDA"])[:2], release(driver)[:2]
    if toolkit[0] > known[0]:
        return (
            f"kdkernels._cuda was built with CUDA {built['CUDA']}, and the driver knows CUDA "
            f"{driver} at most: update the driver, or build with the nvcc of CUDA {known[0]}"
        )
    if code == "PTX" and toolkit > known:
        return (
            f"kdkernels._cuda has no machine code for {name} {capability}, and the driver, which "
            f"knows CUDA {driver} at most, compiles none of CUDA {built['CUDA']}: update the "
            f"driver, or build with KDKERNELS_CUDA_ARCHS={capability[0]}{capability[1]}"
        )
    return ""
