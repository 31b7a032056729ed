"""Integrations are switched on and off as one."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.distributions import kl as torch_kl

from fastkl.integrations import distributions
from fastkl.integrations._switch import Attribute, Switch, UnsupportedVersion, check_method, find


class Library:
    def kl(self, other=None):
        return "stock"

    @staticmethod
    def helper():
        return "stock"


class Child(Library):
    pass


def switch(*names: str, owner=Library) -> Switch:
    return Switch(lambda: [Attribute(owner, name, lambda *args: "fastkl") for name in names])


def test_disabled_it_leaves_everything_as_it_was():
    before = dict(vars(Library))
    with switch("kl", "helper").enable():
        assert (Library().kl(), Library.helper()) == ("fastkl", "fastkl")
    assert dict(vars(Library)) == before


def test_an_inherited_method_is_inherited_again():
    with switch("kl", owner=Child).enable():
        assert Child().kl() == "fastkl"
    assert "kl" not in vars(Child)


def test_what_is_enabled_twice_has_to_be_disabled_twice():
    one = switch("kl")
    with one.enable():
        with one.enable():
            assert Library().kl() == "fastkl"
        assert Library().kl() == "fastkl"
    assert Library().kl() == "stock"
    with pytest.raises(RuntimeError, match="not enabled"):
        one.disable()


def wrapping(word: str) -> Switch:
    def changes() -> list[Attribute]:
        below = Library.kl
        return [Attribute(Library, "kl", lambda self: f"{word} over {below(self)}")]

    return Switch(changes)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (1, 2, 0)])
def test_integrations_of_one_method_are_disabled_in_any_order(order):
    before, words = dict(vars(Library)), ["a", "b", "c"]
    switches = [wrapping(word).enable() for word in words]
    assert Library().kl() == "c over b over a over stock"
    left = list(words)
    for place in order:
        switches[place].disable()
        left.remove(words[place])
        assert Library().kl() == " over ".join([*reversed(left), "stock"])
    assert dict(vars(Library)) == before


def test_what_somebody_else_has_replaced_meanwhile_stays():
    class Own(Library):
        def kl(self):
            return "stock"

    with switch("kl", owner=Own).enable():
        Own.kl = lambda self: "theirs"
    assert Own().kl() == "theirs"


def test_an_error_halfway_undoes_the_first_half():
    half = Switch(lambda: [Attribute(Library, "kl", None), Attribute(object, "kl", None)])  # object takes no attributes
    with pytest.raises(TypeError):
        half.enable()
    assert Library().kl() == "stock"
    with pytest.raises(RuntimeError, match="not enabled"):
        half.disable()


def test_an_error_inside_the_block_disables_too():
    with pytest.raises(KeyError), switch("kl").enable():
        raise KeyError
    assert Library().kl() == "stock"


def test_other_parameters_are_refused():
    check_method(Library, "kl", ("self", "other"), "library 1.0")
    with pytest.raises(UnsupportedVersion, match=r"Library.kl takes \(self, other\).*\(self\); library 1.0"):
        check_method(Library, "kl", ("self",), "library 1.0")
    with pytest.raises(UnsupportedVersion, match=r"Library\.nll is missing"):
        check_method(Library, "nll", ("self",), "library 1.0")


def test_what_a_library_lacks_is_refused():
    for module, name in (("fastkl.priors", "Nowhere"), ("fastkl.nowhere", "Prior")):
        with pytest.raises(UnsupportedVersion, match=rf"^{module}\.{name} is missing; library 1\.0 is not supported"):
            find(module, name, "library 1.0")


def test_a_block_ends_its_own_options():
    """Not those enabled last, which another thread may have done."""
    one = Switch(lambda word: [Attribute(Library, "kl", lambda self: word)])
    first, second = one.enable(word="first"), one.enable(word="second")
    first.__exit__(None, None, None)
    assert Library().kl() == "second"
    with pytest.raises(RuntimeError, match="not enabled"):
        first.disable()
    second.disable()
    assert Library().kl() == "stock"


def test_what_has_been_compiled_is_compiled_anew():
    """torch.compile does not notice that a method of a class has been replaced."""

    class Density:
        def log_prob(self, x):
            return x + 1

    density = Density()
    compiled = torch.compile(lambda x: density.log_prob(x), backend="eager")
    one = Switch(lambda: [Attribute(Density, "log_prob", lambda self, x: x + 2)])
    found = [compiled(torch.zeros(())).item()]
    with one.enable():
        found.append(compiled(torch.zeros(())).item())
        with one.enable():
            found.append(compiled(torch.zeros(())).item())
    assert [*found, compiled(torch.zeros(())).item()] == [1, 2, 2, 1]


def test_a_library_that_changed_meanwhile_takes_nothing_from_the_others():
    """Disabling the first layer makes the later ones anew. One that cannot be made stays counted."""
    broken = False

    def changes() -> list[Attribute]:
        if broken:
            raise UnsupportedVersion("another version")
        return [Attribute(Library, "kl", lambda self: "second")]

    before, second = dict(vars(Library)), Switch(changes)
    first, third = wrapping("first").enable(), wrapping("third")
    with second.enable(), third.enable():
        assert Library().kl() == "third over second"
        broken = True
        with pytest.raises(UnsupportedVersion, match="another version"):
            first.disable()
        assert Library().kl() == "third over stock"
        with pytest.raises(UnsupportedVersion):  # and not as something that is enabled already
            second.enable()
        broken = False
        with second.enable():
            assert Library().kl() == "second"
    assert dict(vars(Library)) == before
    with pytest.raises(RuntimeError, match="not enabled"):
        second.disable()


def test_a_step_of_one_graph_stays_one():
    """Registering a divergence forgets those that torch has looked up, and the compiler cannot look them up."""

    class Mine(Normal):
        pass

    def kl(x):
        p, q = Mine(x, x.exp(), validate_args=False), Normal(0 * x, x.exp(), validate_args=False)
        return kl_divergence(p, q) + kl_divergence(q, q)

    x = torch.linspace(-1, 1, 5)
    expected, known = kl(x), dict(torch_kl._KL_MEMOIZE)
    compiled = torch.compile(kl, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    with distributions.enable():
        assert torch_kl._KL_MEMOIZE[Mine, Normal] is distributions.kl_of_normals
        torch.testing.assert_close(compiled(x), expected)
    assert known == torch_kl._KL_MEMOIZE
    assert torch.equal(compiled(x), expected)
