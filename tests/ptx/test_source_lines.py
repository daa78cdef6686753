"""Which source line an error names: .loc directives, inlined code, inline assembly."""

import pytest
from programs import kernel, launch

WRONG = "ld.global.u32 %r0, [%buffer0];\n"  # an address that was not passed
FILES = '.file 1 "/sources/me/mine.py"\n.file 2 "/lib/standard.py"\n'


def source_of_error(body: str) -> str | None:
    text = kernel(f"mov.u64 %buffer0, 64;\n{body}", 0).replace(".visible", FILES + ".visible", 1)
    (error,) = launch(text)["errors"]
    assert error["kind"] == "bounds" and error["instruction"] == WRONG.strip()
    assert text.splitlines()[error["line"] - 1] == WRONG.strip()
    return error["source"]


def test_without_a_table() -> None:
    assert source_of_error(WRONG) is None


def test_the_last_directive_counts() -> None:
    assert source_of_error(f".loc 1 3 0\n.loc\t1 7 5 // mine.py:7:5\n{WRONG}.loc 1 9 0\n") == "mine.py:7"


@pytest.mark.parametrize("order", [1, -1])
def test_code_inlined_from_another_file(order: int) -> None:
    """It is the caller's line in the kernel's own file, over any number of calls, listed in any order."""
    chain = [
        ".loc 2 314 12, function_name $L__info_string0, inlined_at 1 44 30 // standard.py:314:12\n",
        ".loc 2 287 12, function_name $L__info_string0+25, inlined_at 2 314 12 // standard.py:287:12\n",
    ]
    assert source_of_error(".loc 1 40 0\n" + "".join(chain[::order]) + ".loc 2 287 12\n" + WRONG) == "mine.py:44"


def test_code_inlined_from_the_same_file() -> None:
    assert source_of_error(f".loc 1 40 0\n.loc 1 12 5, function_name $L, inlined_at 1 44 30\n{WRONG}") == "mine.py:12"


def test_code_of_another_file_that_says_not_where_it_is_called() -> None:
    assert source_of_error(f".loc 1 40 0\n.loc 2 12 5\n{WRONG}") == "standard.py:12"


def test_lines_of_inline_assembly_are_no_lines_of_the_source() -> None:
    """LLVM counts the lines of inline assembly on from the statement's line."""
    block = "// begin inline asm\n.loc 1 {0} 9\nmov.u32 %r0, 0x0;\n.loc 1 {1} 9\n{2}// end inline asm\n"
    assert source_of_error(".loc 1 20 0\n" + block.format(26, 27, WRONG)) == "mine.py:26"
    first = block.format(26, 27, "")
    assert source_of_error(".loc 1 20 0\n" + first + block.format(30, 31, WRONG)) == "mine.py:30"
