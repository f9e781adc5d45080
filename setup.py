"""Build of fastvae's shared object against the torch of the environment it is installed into.

Environment variables:
    FASTVAE_CUDA         auto (default: CUDA kernels if nvcc and a CUDA build of torch are there), 1 or 0
    TORCH_CUDA_ARCH_LIST architectures to compile for (default: 8.0 9.0a 10.0+PTX, as far as nvcc knows them)
    FASTVAE_SANITIZE     sanitizers, as -fsanitize takes them: address (`make test-asan`); default: none
    MAX_JOBS             parallel compiler processes
"""

import contextlib
import glob
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def find_torch() -> None:
    """Make `import torch` find the torch that fastvae will run with.

    pip builds in an isolated environment. A torch of its own there would be another build than the one that
    loads the shared object, so the one of the target environment is used.
    """
    try:
        import torch
    except ImportError:
        for key in ("purelib", "platlib"):
            path = sysconfig.get_path(key, vars={"base": sys.prefix, "platbase": sys.prefix})
            if path not in sys.path and (Path(path) / "torch").is_dir():
                sys.path.append(path)
        try:
            import torch  # noqa: F401
        except ImportError:
            raise SystemExit(
                "fastvae is compiled against the torch that it will run with, and none is installed here. "
                "Install the build of torch that fits your machine first (the selector on PyTorch's home page "
                "gives the command), then run: pip install fastvae"
            ) from None


find_torch()

import torch  # noqa: E402
from setuptools import setup  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402


def cuda_wanted() -> bool:
    """Whether to compile the CUDA kernels: decided by nvcc and torch's build, never by a visible GPU."""
    switch = os.environ.get("FASTVAE_CUDA", "auto")
    if switch not in ("auto", "0", "1"):
        raise SystemExit(f"FASTVAE_CUDA: expected auto, 0 or 1, got {switch!r}")
    nvcc = shutil.which("nvcc") or (
        cpp_extension.CUDA_HOME and str(Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc")
    )
    possible = bool(torch.version.cuda) and bool(nvcc) and Path(str(nvcc)).exists()
    if switch == "1" and not possible:
        raise SystemExit(
            f"FASTVAE_CUDA=1 needs nvcc (found: {nvcc}) and a CUDA build of torch (torch.version.cuda is "
            f"{torch.version.cuda}); install both or set FASTVAE_CUDA=0"
        )
    return possible and switch != "0"


def sources(*patterns: str) -> list[str]:
    """The same globs as CMakeLists.txt, relative to this file."""
    found = [path for pattern in patterns for path in sorted(glob.glob(str(ROOT / pattern), recursive=True))]
    return [os.path.relpath(path, ROOT) for path in found]


FOLDERS = ("autograd", "common", "ops", "network", "kernels/cpu")


def extension():
    cuda = cuda_wanted()
    # -ffp-contract stays at its default: fused multiply-adds where the instruction set has them.
    compile_args = [
        "-std=c++20",
        "-O3",
        "-g0",
        "-fopenmp",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wextra",
    ]
    compile_args += ["-Wno-unused-parameter", "-Wno-psabi", "-fvisibility=hidden"]
    if "x86_64" in os.uname().machine:
        compile_args.append("-mprefer-vector-width=512")
    link_args = ["-Wl,-s"]
    # torch/csrc/autograd's headers then bring the operators that they use and no others.
    macros: list[tuple[str, str | None]] = [("AT_PER_OPERATOR_HEADERS", None)]
    if sanitizers := os.environ.get("FASTVAE_SANITIZE"):
        # A sanitizer's runtime is not up yet when the loader asks which clone of a kernel to take.
        macros.append(("FASTVAE_NO_CLONES", None))
        compile_args += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g1", "-O1"]
        link_args = [f"-fsanitize={sanitizers}"]
    files = sources("csrc/*.cpp", *(f"csrc/{folder}/*.cpp" for folder in FOLDERS))
    options = {"cxx": compile_args}
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a;10.0+PTX")
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ")
        macros += [("FASTVAE_WITH_CUDA", None), ("FASTVAE_CUDA_ARCHITECTURES", f'"{architectures}"')]
        files += sources("csrc/kernels/cuda/*.cu")
        options["nvcc"] = [
            "-std=c++20",
            "-O3",
            "--expt-relaxed-constexpr",
            "-Xcompiler",
            "-fvisibility=hidden",
        ]
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    # -fopenmp is for the compiler alone: linking it would bring a second OpenMP runtime beside torch's.
    return kind(
        "fastvae._C",
        files,
        depends=sources(
            "csrc/**/*.h", "csrc/**/*.cuh", "csrc/**/*.cu"
        ),  # a source distribution holds them too
        extra_compile_args=options,
        define_macros=macros,
        extra_link_args=link_args,
    )


@contextlib.contextmanager
def silent_unless_failing():
    """Keep what this process and the compilers print, and show it only if something fails."""
    sys.stdout.flush()
    terminal = os.dup(1)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1)
        try:
            yield
        except BaseException:
            sys.stdout.flush()
            log.seek(0)
            os.write(terminal, log.read())
            raise
        finally:
            sys.stdout.flush()
            os.dup2(terminal, 1)
            os.close(terminal)


class BuildExtension(cpp_extension.BuildExtension):
    """torch's build, which also writes down what it built against, read before the object is opened.

    With ``setup.py --quiet`` it does not show ninja's command lines, unless one fails.
    """

    def run(self) -> None:
        with contextlib.nullcontext() if self.verbose else silent_unless_failing():
            super().run()
        package = ROOT / "fastvae" if self.inplace else Path(self.build_lib) / "fastvae"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.py").write_text(
            '"""Written by setup.py."""\n\n'
            f"TORCH_VERSION = {torch.__version__!r}\nTORCH_CUDA = {torch.version.cuda!r}\n"
        )


TORCH_MINOR = ".".join(torch.__version__.split(".")[:2])
IS_SOURCE = "sdist" in sys.argv


def version() -> str:
    """That of _version.py; a wheel's also says what its shared object was built for: 0.1.0+torch2.13.cpu."""
    for line in (ROOT / "fastvae" / "_version.py").read_text().splitlines():
        if line.startswith("__version__"):
            own = line.split('"')[1]
            kernels = "cu" + str(torch.version.cuda).replace(".", "") if cuda_wanted() else "cpu"
            return own if IS_SOURCE else f"{own}+torch{TORCH_MINOR}.{kernels}"
    raise SystemExit("fastvae/_version.py: no __version__ line")


def torch_requirement() -> str:
    """A wheel holds a shared object for one minor version of torch; a source distribution, none yet."""
    return "torch>=2.10" if IS_SOURCE else f"torch=={TORCH_MINOR}.*"


setup(
    version=version(),
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
    install_requires=[torch_requirement(), "numpy>=1.24"],
)
