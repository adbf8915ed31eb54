"""What training pays for `import autoeval_hooks`: the standard library, and not all of it."""

from __future__ import annotations

import subprocess
import sys

FORBIDDEN = {"torch", "transformers", "wandb", "pydantic", "openai", "filelock", "yaml", "numpy", "eval_runner"}


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return {name.split(".")[0] for name in out.split()}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not modules_after("import autoeval_hooks") & FORBIDDEN


def test_submitting_by_hand_loads_nothing_heavy() -> None:
    assert not modules_after("from autoeval_hooks import submit") & FORBIDDEN


def test_every_export_can_be_imported() -> None:
    names = "', '".join(__import__("autoeval_hooks").__all__)
    modules_after(f"import autoeval_hooks; [getattr(autoeval_hooks, n) for n in ['{names}']]")


def test_no_module_hides_an_export() -> None:
    """Importing a submodule sets it as the package's attribute, over a lazy export of the same name."""
    import pkgutil

    import autoeval_hooks

    assert not {m.name for m in pkgutil.iter_modules(autoeval_hooks.__path__)} & set(autoeval_hooks.__all__)
