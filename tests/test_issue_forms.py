""".github/ISSUE_TEMPLATE: forms that GitHub takes, and that name files and commands which exist."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
KINDS = {"markdown", "input", "textarea", "dropdown", "checkboxes"}


@pytest.mark.parametrize("form", [form for form in FORMS if form.stem != "config"], ids=lambda form: form.stem)
def test_a_form_has_what_github_asks_for(form):
    text = form.read_text(encoding="utf-8")
    values = YAML(typ="safe").load(text)
    assert {"name", "description", "body"} <= values.keys()
    assert {field["type"] for field in values["body"]} <= KINDS
    fields = [field for field in values["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 0
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)
    assert all((ROOT / name).is_file() for name in re.findall(r"\b(?:docs/\w+|[A-Z]+)\.md\b", text))


def test_there_is_a_form_for_a_fault_a_result_and_a_wish():
    assert {form.stem for form in FORMS} == {"bug", "config", "feature", "result"}
