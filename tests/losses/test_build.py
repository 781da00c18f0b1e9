"""Builds of the kernels: the cache, what goes wrong, and what runs where there are none."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from trainer.losses import KernelBuildError, build, choose, compile_ahead
from trainer.losses import fused as fused_module

CHECKOUT = Path(__file__).resolve().parents[2]


def called(workshop: Path) -> int:
    """How often something was compiled or linked."""
    calls = workshop / "calls"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def built(workshop: Path) -> list[Path]:
    return [p for p in (workshop / "cache").rglob("*.so") if p.parent.suffix != ".part"]


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A few small sources in the place of the kernels', a cache, and a compiler that keeps a list of its calls."""
    real = shutil.which(os.environ.get("CXX") or "c++")
    if real is None:
        pytest.skip("NO C++ COMPILER: builds are not tested")
    source, compiler = tmp_path / "csrc", tmp_path / "compiler"
    (source / "cpu").mkdir(parents=True)
    (source / "binding.cpp").write_text("int sett_two();\nint sett_four() { return 2 * sett_two(); }\n")
    (source / "cpu" / "two.cpp").write_text('#include "two.h"\nint sett_two() { return TWO; }\n')
    (source / "two.h").write_text("#define TWO 2\n")
    listing = f'[ "$1" = --version ] || {{ echo "$@" >> {tmp_path}/calls; sleep 0.2; }}'
    compiler.write_text(f'#!/bin/sh\n{listing}\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "source_folder", lambda: source)
    monkeypatch.setenv("SETT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return tmp_path


def test_a_build_is_kept_and_used_again(workshop: Path) -> None:
    said: list[str] = []
    first = build.library(say=said.append)
    assert first.is_file()
    assert first.is_relative_to(workshop / "cache" / "kernels")
    assert called(workshop) == 3  # two sources and their link
    assert len(said) == 2
    assert not list(first.parent.glob("*.o"))
    assert build.library(say=said.append) == first
    assert called(workshop) == 3
    assert len(said) == 2


@pytest.mark.parametrize("name", ["binding.cpp", "cpu/two.cpp", "two.h"])
def test_a_changed_source_is_another_build(workshop: Path, name: str) -> None:
    first = build.library()
    (workshop / "csrc" / name).write_text((workshop / "csrc" / name).read_text() + "// more\n")
    second = build.library()
    assert second != first
    assert called(workshop) == 6
    assert first.exists()  # an older checkout beside this one keeps its own


def test_other_flags_and_other_versions_of_torch_are_other_builds(
    workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [build.library()]
    monkeypatch.setattr(build, "_CXX_FLAGS", (*build._CXX_FLAGS, "-DANOTHER"))
    paths.append(build.library())
    monkeypatch.setattr(build.torch, "__version__", "99.0")
    paths.append(build.library())
    assert len(set(paths)) == 3


def test_a_source_that_does_not_compile_is_quoted(workshop: Path) -> None:
    source = workshop / "csrc" / "cpu" / "two.cpp"
    good = source.read_text()
    source.write_text(good + '#error "sett was here"\n')
    for _ in range(2):  # a failed build is no build: the second attempt fails likewise
        with pytest.raises(KernelBuildError, match="sett was here") as caught:
            build.library()
        assert "two.cpp" in str(caught.value)
        assert not built(workshop)
    source.write_text(good)
    assert build.library().is_file()


def test_what_does_not_link_is_an_error_too(workshop: Path) -> None:
    (workshop / "csrc" / "cpu" / "again.cpp").write_text("int sett_two() { return 2; }\n")
    with pytest.raises(KernelBuildError, match="sett_two"):
        build.library()
    assert not built(workshop)


def test_what_a_killed_build_left_is_no_obstacle(workshop: Path) -> None:
    library = build.library()
    folder = library.parent
    shutil.rmtree(folder)
    leftover = folder.with_name(f"{folder.name}.part")
    leftover.mkdir()
    (leftover / library.name).write_text("half a library")
    assert build.library() == library
    assert library.read_bytes()[:4] == b"\x7fELF"
    assert not leftover.exists()


def test_processes_that_want_the_same_build_make_it_once(workshop: Path) -> None:
    script = textwrap.dedent(
        """
        import pathlib, sys
        from trainer.losses import build
        build.source_folder = lambda: pathlib.Path(sys.argv[1])
        print(build.library())
        """
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(workshop / "csrc")], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    paths = {process.communicate(timeout=100)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(paths) == 1
    assert Path(paths.pop()).is_file()
    assert called(workshop) == 3


def test_no_compiler_names_the_remedy(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelBuildError, match=r"C\+\+ compiler.*apt-get install"):
        build.library()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(workshop / "cache"))
    with pytest.raises(KernelBuildError, match=r"C\+\+ compiler.*apt-get install"):
        build.library()


def test_the_kernels_are_found_in_the_checkout() -> None:
    folder = build.source_folder()
    assert folder == CHECKOUT / "kernels" / "csrc"
    assert (folder / "binding.cpp").is_file()


# The choice.


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No build succeeds; a list of the attempts."""
    attempts: list[str] = []

    def fail(*arguments: Any, **named: Any) -> Path:
        attempts.append("build")
        raise KernelBuildError("there is no C++ compiler here")

    monkeypatch.setattr(build, "library", fail)
    monkeypatch.setattr(fused_module, "_loaded", False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return attempts


def test_auto_falls_back_with_one_warning(broken: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    chosen = choose("auto")
    assert chosen.name == "reference"
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("warning:") == 1
    assert "there is no C++ compiler here" in err
    assert "kernels: reference" in err


def test_one_rank_of_a_machine_warns(
    broken: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose("auto").name == "reference"
    assert capfd.readouterr().err == ""


def test_fused_raises_where_it_cannot_be_built(broken: list[str]) -> None:
    with pytest.raises(KernelBuildError, match=r"no C\+\+ compiler here"):
        choose("fused")
    with pytest.raises(KernelBuildError, match=r"no C\+\+ compiler here"):
        compile_ahead("fused", lambda text: None)


def test_reference_never_builds(broken: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    compile_ahead("reference", lambda text: None)
    assert choose("reference").name == "reference"
    assert broken == []
    assert capfd.readouterr().err == ""


def test_compiling_ahead_leaves_the_warning_to_the_choice(broken: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    compile_ahead("auto", lambda text: None)
    assert broken == ["build"]
    assert capfd.readouterr().err == ""


def test_auto_is_fused_where_it_can_be_built(fused: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert choose("auto").name == "fused"
    assert fused.name == "fused"
    assert capfd.readouterr().err == ""


def test_auto_falls_back_where_nothing_can_be_written(
    workshop: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (workshop / "cache").write_text("a file where the cache's folder should be")
    monkeypatch.setattr(fused_module, "_loaded", False)
    assert choose("auto").name == "reference"
    assert capfd.readouterr().err.count("warning:") == 1
    with pytest.raises(KernelBuildError, match=r"cache"):
        choose("fused")


# The name `kernels` belongs to a package of Hugging Face, which transformers imports.


def python(script: str, cwd: Path, **environment: str) -> str:
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"} | environment
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_kernels_of_hugging_face_is_not_shadowed(tmp_path: Path) -> None:
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("MARKER = 'Hugging Face'\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = "import trainer.losses, kernels; print(kernels.MARKER, trainer.losses.choose('reference').name)"
    assert python(script, elsewhere, PYTHONPATH=str(package.parent)) == "Hugging Face reference"


def test_sett_brings_no_module_of_that_name(tmp_path: Path) -> None:
    """A namespace package would do: transformers takes what `find_spec` finds for an installed package."""
    script = textwrap.dedent(
        """
        import importlib.util
        import trainer.losses
        spec = importlib.util.find_spec("kernels")
        places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
        print(*(str(place) for place in places), sep="\\n")
        """
    )
    for place in python(script, tmp_path).splitlines():
        assert not Path(place).is_relative_to(CHECKOUT / "kernels"), f"`import kernels` would get {place}"


def test_the_modules_of_the_losses_do_not_build_on_import(tmp_path: Path) -> None:
    python("import trainer.losses.fused, trainer.losses.linear", tmp_path, SETT_CACHE=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
