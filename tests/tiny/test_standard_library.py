from __future__ import annotations

from optuna_lora_rl.tiny import standard_library


def test_task_text_is_no_part_of_pretraining() -> None:
    reserved = set(standard_library.reserved_files())
    assert "logging/__init__.py" in reserved
    assert not reserved & set(standard_library.pretraining_files())


def test_files_are_readable_and_in_order() -> None:
    files = standard_library.pretraining_files()
    assert list(files) == sorted(files)
    assert len(files) > 150
    assert "def dedent" in standard_library.read("textwrap.py")


def test_tests_and_installed_packages_are_left_out() -> None:
    for path in standard_library.pretraining_files() + standard_library.reserved_files():
        assert not {"test", "tests", "site-packages"} & set(path.split("/"))


def test_docstrings_stand_beside_their_declarations() -> None:
    pairs = dict(standard_library.documented("threading.py"))
    declaration = "class Thread: def start(self):"
    assert pairs[declaration].startswith("Start the thread's activity.")
    assert "class Thread:" in pairs
