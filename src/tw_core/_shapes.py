"""Shape annotations that cost nothing: jaxtyping's names where it is installed, inert stand-ins elsewhere.

`Int[np.ndarray, " L"]` in a signature is documentation for people and, under
`pytest --jaxtyping-packages=tw_core,beartype.beartype`, a checked contract. jaxtyping is a development
dependency only, so `import tw_core` must work without it (tests/test_imports.py blocks it and imports).
"""

from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Int32, Int64, Shaped
else:
    try:
        from jaxtyping import Bool, Float, Int, Int32, Int64, Shaped
    except ImportError:

        class _Inert:
            """`Name[array_type, "shape"]` without jaxtyping: the array type, with the shape as a remark."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                array_type, shape = item
                return Annotated[array_type, shape]

        Bool = Float = Int = Int32 = Int64 = Shaped = _Inert

__all__ = ["Bool", "Float", "Int", "Int32", "Int64", "Shaped"]
