"""What `import taco_svd` offers, most of it only once it is asked for."""

from __future__ import annotations

import pytest

import taco_svd


@pytest.mark.parametrize("name", taco_svd.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(taco_svd, name)
    assert (value.__doc__ or "").strip() and name in dir(taco_svd)


def test_other_names_are_an_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        taco_svd.compres  # noqa: B018
