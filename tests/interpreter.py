"""Triton's interpreter without the work that it repeats."""

from collections.abc import Callable
from typing import Any


def patch_once_for_each_launch() -> None:
    """Each launch of a kernel patches Triton's language once, not at each call of a function within the kernel.

    The patches are the same, and looking for what to patch takes a third of the time of our kernels. So does a table
    of dtypes, which the interpreter makes anew for each operation, take a twelfth of the rest.
    """
    from triton import language
    from triton.runtime import interpreter

    patch, launch, find_dtype = (
        interpreter._patch_lang,
        interpreter.GridExecutor.__call__,
        interpreter._get_np_dtype,
    )
    dtypes: dict[str, Any] = {}
    of_module: dict[int, frozenset[str]] = {}
    patched: set[str] = set()

    def patch_once(function: Callable[..., Any]) -> Any:
        names = function.__globals__
        if id(names) not in of_module:  # modules stay
            both = (language, language.core)
            of_module[id(names)] = frozenset(each.__name__ for each in both if any(each is v for v in names.values()))
        if of_module[id(names)] <= patched:
            return interpreter._LangPatchScope()
        patched.update(of_module[id(names)])
        return patch(function)

    def dtype_of(of_triton: Any) -> Any:
        if of_triton.name not in dtypes:
            dtypes[of_triton.name] = find_dtype(of_triton)
        return dtypes[of_triton.name]

    def launch_anew(self: Any, *arguments: Any, **options: Any) -> None:
        patched.clear()
        launch(self, *arguments, **options)

    interpreter._get_np_dtype = dtype_of
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
