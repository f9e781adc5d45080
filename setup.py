"""Build of fastvae's shared object against the torch of the environment it is installed into.

Environment variables:
    FASTVAE_CUDA         auto (default: CUDA kernels if nvcc and a CUDA build of torch are there), 1 or 0
    TORCH_CUDA_ARCH_LIST architectures to compile for (default: 8.0 9.0a 10.0+PTX, as far as nvcc knows them)
    FASTVAE_EMULATE_CUDA 1: CPU tensors take the glue's CUDA branches, and the CUDA kernels run on the CPU, in any
                         folder under build/emulated (`make test-cuda-emulated`); default: 0
    FASTVAE_SANITIZE     sanitizers, as -fsanitize takes them: address (`make test-asan`); default: none
    MAX_JOBS             parallel compiler processes
"""

import os
import sys


def stop(text):
    """End the build with one paragraph, which says what is missing and what to do."""
    raise SystemExit("\nfastvae: " + text + "\n")


# This file parses under Python 3.6, so that an older Python than fastvae's gets a sentence and no SyntaxError.
if sys.version_info < (3, 10):
    stop(
        f"Python 3.10 or later is needed, and this is {sys.version.split()[0]} ({sys.executable}). Make an "
        "environment with a newer one (python3.11 -m venv env), install torch there, then run its pip: pip install ."
    )
if os.name == "nt" or not hasattr(os, "uname"):
    stop(
        "it is compiled with g++ or clang++ on Linux and macOS, and this is Windows, where neither its sources nor "
        "its flags have been tried. Use the Windows Subsystem for Linux: install Python, g++ and torch there, then "
        "run: pip install ."
    )

import contextlib
import glob
import shlex
import shutil
import site
import subprocess
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
LOWEST_TORCH = (2, 10)
BUILD_PACKAGES = "'setuptools>=77' wheel ninja numpy pybind11 typing_extensions packaging"


def is_isolated() -> bool:
    """Whether this build runs in an environment that was made for it and does not show the one to install into.

    pip's is not one of these: it hides the packages of the target, but runs its Python.
    """
    prefix = Path(sys.prefix)
    return (
        "UV_INTERNAL__BUILD_DIR" in os.environ or "builds-v0" in prefix.parts or "build-env-" in prefix.name
    )


def package_folders():
    """Where the packages of this Python lie, also those that pip's isolation hides."""
    yield from (sysconfig.get_path(key) for key in ("purelib", "platlib"))
    config = Path(sys.prefix) / "pyvenv.cfg"
    if config.is_file() and "include-system-site-packages = true" not in config.read_text().lower():
        return
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    schemes = [None, *(name for name in sysconfig.get_scheme_names() if name.startswith("deb_"))]
    for scheme in schemes:
        for key in ("purelib", "platlib"):
            yield sysconfig.get_path(key, **({"scheme": scheme} if scheme else {}), vars=base)
    yield site.getusersitepackages()


def imports_torch() -> bool:
    """Import it; False if there is none, and a paragraph if there is one that does not import or is too old."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name == "torch":
            return False
        reason = error
    except Exception as error:
        reason = error
    else:
        found = str(getattr(torch, "__version__", "of unknown version"))
        numbers = tuple(int(part) if part.isdigit() else 0 for part in found.split("+")[0].split(".")[:2])
        if numbers < LOWEST_TORCH:
            stop(
                f"torch {'.'.join(map(str, LOWEST_TORCH))} or later is needed, and torch {found} is installed "
                f"({Path(torch.__file__).parent}). Install a newer build of it, then run: pip install ."
            )
        return True
    stop(
        f"torch is installed in {sys.prefix}, but cannot be imported ({type(reason).__name__}: {reason}). Mend that "
        f"first (python -c 'import torch' shows it), then run: pip install ."
    )


def find_torch() -> None:
    """Make `import torch` find the torch that fastvae will run with.

    pip builds in an isolated environment. A torch of its own there would be another build than the one that
    loads the shared object, so the one of the target environment is used.
    """
    if imports_torch():
        return
    for folder in package_folders():
        if folder not in sys.path and (Path(folder) / "torch").is_dir():
            sys.path.append(folder)
            if imports_torch():
                return
    if is_isolated():
        stop(
            "it is compiled against the torch that it will run with, and this build is isolated from the environment "
            f"that holds it (it runs in {sys.prefix}; uv and `python -m build` do that). Whether torch is installed "
            f"cannot be seen from here. Install torch and the build's packages into your environment, {BUILD_PACKAGES},"
            " then build without isolation: uv pip install --no-build-isolation . (pip install . needs no option)"
        )
    stop(
        "it is compiled against the torch that it will run with, and none is installed here "
        f"({sys.prefix}). Install the build of torch that fits your machine first (the selector on PyTorch's home "
        "page gives the command), then run: pip install ."
    )


def check_setuptools() -> None:
    """What a build without isolation takes from the environment may be older than pyproject.toml asks for."""
    try:
        import setuptools
    except ImportError:
        found = "none"
    else:
        found = setuptools.__version__
        if int(found.split(".")[0]) >= 77 or found.startswith("0."):  # it knows no version of its own
            return
    stop(
        f"setuptools 77 or later is needed to build, and {found} is installed. Install the build's packages: "
        f"pip install {BUILD_PACKAGES} (or build with isolation, which brings them: pip install .)"
    )


check_setuptools()
find_torch()

import torch
from setuptools import setup
from torch.utils import cpp_extension

EMULATED = os.environ.get("FASTVAE_EMULATE_CUDA", "0") == "1"
EMULATED_FOLDER = ROOT / "build" / "emulated"


def cuda_wanted() -> bool:
    """Whether to compile the CUDA kernels: decided by nvcc and torch's build, never by a visible GPU."""
    switch = "0" if EMULATED else os.environ.get("FASTVAE_CUDA", "auto")
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


FOLDERS = ("common", "ops", "network", "kernels/cpu")


def emulated_sources() -> list[str]:
    """The CUDA sources as C++, behind the host's stand-in for CUDA; their kernels keep names that can be asked for."""
    shim = ROOT / "tests" / "cpp" / "host_cuda.h"
    folder = EMULATED_FOLDER / "sources"
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "csrc" / "kernels" / "cuda").glob("*.cu")):
        text = f'#pragma GCC visibility push(default)\n#include "{shim}"\n#include "{path}"\n'
        wrapper = folder / f"{path.stem}.cpp"
        if not wrapper.exists() or wrapper.read_text() != text:
            wrapper.write_text(text)
    return sources("build/emulated/sources/*.cpp", "tests/cpp/emulated_launches.cpp")


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
    if os.uname().machine == "x86_64":
        compile_args.append("-mprefer-vector-width=512")
    link_args = ["-Wl,-s"]
    # torch/csrc/autograd's headers then bring the operators that they use and no others.
    macros: list[tuple[str, str | None]] = [("AT_PER_OPERATOR_HEADERS", None)]
    sanitizers = os.environ.get("FASTVAE_SANITIZE")
    if sanitizers:
        # A sanitizer's runtime is not up yet when the loader asks which clone of a kernel to take.
        macros.append(("FASTVAE_NO_CLONES", None))
        compile_args += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g1", "-O1"]
        link_args = [f"-fsanitize={sanitizers}"]
    files = sources("csrc/*.cpp", *(f"csrc/{folder}/*.cpp" for folder in FOLDERS))
    if EMULATED:
        # Threads as on a device; few blocks, so that small arrays take several strides over the grid.
        macros += [
            ("FASTVAE_EMULATE_CUDA", None),
            ("FASTVAE_CUDA_THREADS", "256"),
            ("FASTVAE_HOST_BLOCKS", "7"),
        ]
        macros.append(("FASTVAE_NO_CLONES", None))
        compile_args.append("-O1")
        files += emulated_sources()
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


def refused(command, flags) -> str:
    """What a compiler says of a small C++20 program under these flags; nothing if it takes them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <concepts>\ntemplate <std::integral T> T same(T x) { return x; }\n")
        result = subprocess.run(
            [*command, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    return "" if result.returncode == 0 else result.stdout.strip() or f"exit status {result.returncode}"


def check_compiler(flags):
    """Those of the flags that the compiler takes; a paragraph if it is missing or has no C++20.

    A compiler without OpenMP (Apple's clang) builds kernels for one thread, and -m flags are for some processors.
    """
    named = os.environ.get("CXX")
    command = shlex.split(named or "c++")
    if not command or shutil.which(command[0]) is None:
        stop(
            f"a C++20 compiler is needed, and {named or 'c++'} is not on the PATH"
            f"{' (CXX names it)' if named else ''}. Install g++ 11 or later (apt-get install g++; on macOS "
            "xcode-select --install), or name another: CXX=clang++ pip install ."
        )
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").is_file():
        stop(
            f"Python's headers are needed, and {include} holds no Python.h. Install them (apt-get install "
            "python3-dev, or the package of that name for your Python), then run: pip install ."
        )
    fault = refused(command, ["-std=c++20"])
    if fault:
        stop(
            f"a C++20 compiler is needed, and {shlex.join(command)} does not compile a small C++20 program "
            f"({fault[:500]}). Install g++ 11 or clang++ 14 or later, or name another: CXX=clang++-14 pip install ."
        )
    if not refused(command, flags):
        return flags
    taken = [flag for flag in flags if not refused(command, [flag])]
    for flag in flags:
        if flag not in taken:
            print(
                f"fastvae: {shlex.join(command)} does not take {flag}, so the build goes without it"
                + ("; kernels will run on one thread each" if flag == "-fopenmp" else ""),
                file=sys.stderr,
            )
    return taken


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
        if EMULATED and (self.inplace or EMULATED_FOLDER not in Path(self.build_lib).resolve().parents):
            stop(
                "FASTVAE_EMULATE_CUDA=1 is for tests and slow. It builds under build/emulated, never in the place of "
                "another build: make test-cuda-emulated"
            )
        for extension in self.extensions:
            extension.extra_compile_args["cxx"] = check_compiler(extension.extra_compile_args["cxx"])
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
    install_requires=[torch_requirement(), "numpy>=1.24", "pillow>=10", "safetensors>=0.4", "tqdm>=4.60"],
)
