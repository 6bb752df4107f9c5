"""The head's loss, computed in pieces: the same value and gradients as transformers' loss on all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mingru_hf.losses
from mingru_hf import MinGRUConfig, MinGRUForCausalLM
from mingru_hf.losses import check_class_ids, classification_loss, head_loss

# Sums of the same float32 numbers in different orders.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Make pieces of seven rows for a vocabulary of 40, so that the last piece of 36 or 60 rows is shorter."""
    monkeypatch.setattr(mingru_hf.losses, "PIECE_ELEMENTS", 7 * 40 + 3)


def make_model(**changes):
    torch.manual_seed(0)
    values = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.3}
    return MinGRUForCausalLM(MinGRUConfig(**(values | changes)))


def loss_and_gradients(model, ids, labels, skip_logits, autocast=False, **kwargs):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(ids, labels=labels, skip_logits=skip_logits, **kwargs)
    output.loss.backward()
    assert (output.logits is None) == skip_logits
    return output.loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(model, tolerance=FLOAT32, ignore=0, shape=(3, 12), **kwargs):
    ids = torch.randint(40, shape)
    labels = ids.clone()
    labels[:, :ignore] = -100
    plain, in_pieces = (loss_and_gradients(model, ids, labels, skip, **kwargs) for skip in (False, True))
    assert in_pieces[0].dtype == plain[0].dtype == torch.float32
    torch.testing.assert_close(in_pieces, plain, **tolerance)
    assert any(gradient.abs().max() > 1e-3 for gradient in plain[1].values())


@pytest.mark.parametrize("shape", [(3, 12), (1, 2), (5, 12), (1, 7), (4, 2)])
def test_loss_and_gradients_equal_those_of_all_logits(shape):
    assert_equal(make_model(), shape=shape)


@pytest.mark.parametrize(
    "changes",
    [{"lm_head_bias": True}, {"tie_word_embeddings": True}, {"lm_head_bias": True, "tie_word_embeddings": True}],
    ids=["bias", "tied", "both"],
)
def test_bias_and_tied_embeddings(changes):
    assert_equal(make_model(**changes), ignore=3)


@pytest.mark.parametrize("ignore", [1, 5, 11])
def test_places_without_a_label_do_not_count(ignore):
    assert_equal(make_model(), ignore=ignore)


@pytest.mark.parametrize("items", [17, torch.tensor(17)])
def test_the_number_of_items_divides(items):
    assert_equal(make_model(), ignore=2, num_items_in_batch=items)


def test_labels_that_are_shifted_already():
    assert_equal(make_model(), shift_labels=torch.randint(40, (3, 12)))


def test_another_label_to_ignore():
    assert_equal(make_model(), ignore_index=4)


def assert_as_exact(model, exact, **kwargs):
    """Check that our results differ from the float32 model's about as much as 16-bit products do anyway."""
    ids = torch.randint(40, (6, 20))
    runs = [loss_and_gradients(model, ids, ids, skip, **kwargs) for skip in (False, True)]
    loss, gradients = loss_and_gradients(exact, ids, ids, skip_logits=False)
    (plain_loss, plain), (our_loss, ours) = runs
    assert abs(our_loss - loss) <= abs(plain_loss - loss) + 1e-3
    for name, gradient in gradients.items():
        error, plain_error = ((run[name].float() - gradient).norm() / gradient.norm() for run in (ours, plain))
        assert error <= 2 * plain_error + 2e-3, name
        assert error < 0.1, name


def test_autocast_to_bfloat16():
    assert_as_exact(make_model(lm_head_bias=True), make_model(lm_head_bias=True), autocast=True)


def test_a_model_in_bfloat16():
    assert_as_exact(make_model(lm_head_bias=True).bfloat16(), make_model(lm_head_bias=True).bfloat16().float())


def test_gradient_checkpointing():
    model = make_model(residual_dropout=0.0)
    model.activation_checkpointing_enable()
    assert_equal(model.train())


@pytest.mark.parametrize("frozen", ["lm_head", "model"])
def test_frozen_parts_need_no_gradient(frozen):
    model = make_model(lm_head_bias=True)
    getattr(model, frozen).requires_grad_(False)
    assert_equal(model)


def test_all_places_ignored_give_nan_as_they_do_elsewhere():
    model, ids = make_model(), torch.randint(40, (2, 5))
    for skip_logits in (False, True):
        model.zero_grad()
        loss = model(ids, labels=torch.full_like(ids, -100), skip_logits=skip_logits).loss
        assert loss.isnan()
        loss.backward()
        assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_without_gradients_the_loss_is_the_same():
    model, ids = make_model().eval(), torch.randint(40, (3, 12))
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, labels=ids, skip_logits=True).loss, model(ids, labels=ids).loss, **FLOAT32
        )


def test_two_backward_passes_add_up():
    model, ids = make_model(), torch.randint(40, (3, 12))
    loss = model(ids, labels=ids, skip_logits=True).loss
    loss.backward(retain_graph=True)
    once = model.lm_head.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, 2 * once, **FLOAT32)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from torch's tracing
def test_compiled_in_one_graph():
    model, ids = make_model(lm_head_bias=True), torch.randint(40, (3, 12))
    plain = loss_and_gradients(model, ids, ids, skip_logits=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss = compiled(ids, labels=ids, skip_logits=True).loss
    loss.backward()
    torch.testing.assert_close(loss, plain[0], **FLOAT32)
    torch.testing.assert_close(model.lm_head.weight.grad, plain[1]["lm_head.weight"], **FLOAT32)


def test_the_logits_of_all_places_are_never_there(monkeypatch):
    """The largest tensor that the head's loss creates is as large as the hidden states."""
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            results = result if isinstance(result, (tuple, list)) else [result]
            largest.extend(r.numel() for r in results if isinstance(r, torch.Tensor))
            return result

    head, hidden = nn.Linear(16, 40), torch.randn(10, 50, 16, requires_grad=True)
    labels = torch.randint(40, (10, 50))
    with Sizes():
        mingru_hf.losses.head_loss(hidden, head, labels).backward()
    assert max(largest) == 10 * 50 * 16
    assert hidden.grad.abs().max() > 0


# ---- the head alone ----


def make_rows(vocab_size=40, num_rows=60, width=16, bias=True):
    """Return a head, its inputs, and labels that are already shifted."""
    head, hidden = nn.Linear(width, vocab_size, bias=bias), torch.randn(num_rows, width, requires_grad=True)
    return head, hidden, torch.randint(vocab_size, (num_rows,))


def assert_cross_entropy(head, hidden, labels):
    loss, expected = head_loss(hidden, head, None, shift_labels=labels), F.cross_entropy(head(hidden), labels)
    wanted = [tensor for tensor in (hidden, *head.parameters()) if tensor.requires_grad]
    ours, theirs = (torch.autograd.grad(value, wanted) for value in (loss, expected))
    torch.testing.assert_close((loss, *ours), (expected, *theirs), **FLOAT32)


def test_a_bias_that_is_not_zero_counts():
    head, hidden, labels = make_rows()
    with torch.no_grad():
        head.bias.copy_(torch.randn(40))
    assert_cross_entropy(head, hidden, labels)


def test_logits_in_the_hundreds_do_not_overflow():
    head, hidden, labels = make_rows()
    assert_cross_entropy(head, (hidden * 300).detach().requires_grad_(), labels)


def test_the_bias_alone_may_be_trained():
    head, hidden, labels = make_rows()
    head.weight.requires_grad_(False)
    assert_cross_entropy(head, hidden.detach(), labels)


def test_autocast_rounds_what_the_head_multiplies():
    head, hidden, labels = make_rows(bias=False)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            loss = head_loss(hidden, head, None, shift_labels=labels)
        rounded = F.cross_entropy(F.linear(hidden.bfloat16(), head.weight.bfloat16()).float(), labels)
        torch.testing.assert_close(loss, rounded, rtol=1e-6, atol=0)
        assert loss != F.cross_entropy(head(hidden), labels)


def test_the_gradients_of_many_pieces_in_16_bits_are_added_up_in_32():
    head, hidden, labels = make_rows(num_rows=6000)
    head.bfloat16()
    head_loss(hidden, head, None, shift_labels=labels).backward()
    exact = nn.Linear(16, 40)
    exact.load_state_dict(head.state_dict())
    F.cross_entropy(exact(hidden.bfloat16().float()), labels).backward()
    for ours, theirs in zip(head.parameters(), exact.parameters(), strict=True):
        assert (ours.grad.float() - theirs.grad).norm() < 0.01 * theirs.grad.norm()


def test_without_gradients_none_are_computed():
    head, hidden, labels = make_rows()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        head_loss(hidden, head, None, shift_labels=labels)
    assert counter.get_total_flops() == 2 * 60 * 16 * 40


def test_pieces_are_bounded_by_the_vocabulary_not_by_the_width():
    head, hidden, labels = make_rows(vocab_size=100, width=4)
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    with Sizes():
        head_loss(hidden, head, None, shift_labels=labels).backward()
    assert max(largest) == 100 * 4  # the weight; all logits would be 6000


@pytest.mark.parametrize("tied", [False, True])
def test_second_derivatives_equal_those_of_all_logits(tied):
    """A penalty on the gradients, as in meta-learning; if the weight is tied, the head's inputs depend on it, too."""
    model = make_model(lm_head_bias=True, tie_word_embeddings=tied)
    ids = torch.randint(40, (3, 12))
    labels = ids.clone()
    labels[:, :4] = -100
    penalties = []
    for skip_logits in (False, True):
        model.zero_grad()
        loss = model(ids, labels=labels, skip_logits=skip_logits).loss
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
        penalties.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*penalties, rtol=1e-3, atol=1e-6)
    assert all(gradient.abs().max() > 1e-3 for gradient in penalties[1].values())


def test_second_derivatives_of_a_function_of_the_loss():
    head, hidden, labels = make_rows()
    results = []
    for loss in (head_loss(hidden, head, None, shift_labels=labels), F.cross_entropy(head(hidden), labels)):
        (gradient,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), (hidden, head.weight)))
    torch.testing.assert_close(*results, **FLOAT32)


def test_labels_of_any_integer_type():
    head, hidden, labels = make_rows()
    losses = [
        head_loss(hidden, head, None, shift_labels=labels.to(d)) for d in (torch.int16, torch.int32, torch.int64)
    ]
    assert losses[0] == losses[1] == losses[2]


def test_labels_in_another_order_of_axes_are_refused():
    head, hidden, labels = make_rows()
    with pytest.raises(ValueError, match=r"labels have the shape \(20, 3\), expected \(3, 20\)"):
        head_loss(hidden.view(3, 20, 16), head, labels.view(20, 3))


# ---- classes ----


@pytest.mark.parametrize(
    ("labels", "given", "problem_type"),
    [
        ([0, 2, 1], torch.int32, "single_label_classification"),
        ([[0], [2], [1]], torch.int64, "single_label_classification"),
        ([[0, 1, 1], [0, 0, 1], [1, 0, 0]], torch.float32, "multi_label_classification"),
    ],
)
def test_labels_tell_the_kind_of_problem(labels, given, problem_type):
    logits, config = torch.randn(3, 3), MinGRUConfig(num_labels=3)
    labels = torch.tensor(labels, dtype=given)
    loss = classification_loss(labels, logits, config)
    if problem_type == "single_label_classification":
        expected = F.cross_entropy(logits, labels.flatten().long())
    else:
        expected = F.binary_cross_entropy_with_logits(logits, labels)
    torch.testing.assert_close(loss, expected)
    assert config.problem_type == problem_type


def test_labels_of_other_number_types_are_taken_as_they_are_meant():
    several, config = torch.tensor([[0, 1, 1], [1, 0, 0]]), MinGRUConfig(problem_type="multi_label_classification")
    logits = torch.randn(2, 3, requires_grad=True)
    torch.testing.assert_close(
        classification_loss(several, logits, config), classification_loss(several.float(), logits, config)
    )
    config = MinGRUConfig(problem_type="regression", num_labels=1)
    loss = classification_loss(torch.tensor([0.5, 1.0], dtype=torch.float64), logits[:, :1], config)
    assert loss.dtype == torch.float32
    assert classification_loss(torch.tensor([0.5, 1.0]), logits[:, :1].double(), config).dtype == torch.float64


def test_labels_that_do_not_fit_are_refused():
    logits, config = torch.randn(3, 4), MinGRUConfig(num_labels=4)
    for labels in ([0, 4, -100], [-1, 0, 1]):
        with pytest.raises(ValueError, match=r"Labels must lie between 0 and 3 \(or be -100\), got "):
            check_class_ids(torch.tensor(labels), config)
    with pytest.raises(ValueError, match="problem_type must be 'regression'"):
        classification_loss(torch.rand(3), logits, MinGRUConfig(num_labels=4, problem_type="foo"))
    config = MinGRUConfig(num_labels=4, problem_type="regression")
    with pytest.raises(ValueError, match=r"labels for regression have the shape \(4,\), expected \(3, 4\)"):
        classification_loss(torch.rand(4), logits, config)


# ---- when logits are skipped ----


def test_the_config_skips_logits_in_training_with_labels_only(tmp_path):
    model, ids = make_model(skip_logits=True), torch.randint(40, (2, 5))
    assert model.train()(ids, labels=ids).logits is None
    assert model(ids).logits is not None
    assert model(ids, labels=ids, skip_logits=False).logits is not None
    assert model.eval()(ids, labels=ids).logits is not None
    model.save_pretrained(tmp_path)
    assert not MinGRUForCausalLM.from_pretrained(tmp_path).config.skip_logits
    assert make_model().train()(ids, labels=ids).logits is not None


def test_a_head_that_is_more_than_its_weight_is_called():
    """For example, an adapter's part of the logits must not be lost."""
    model, ids = make_model(), torch.randint(40, (2, 5))
    before = model(ids, labels=ids, skip_logits=True).loss

    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 3

    model.lm_head.__class__ = Adapted
    output = model(ids, labels=ids, skip_logits=True)
    assert output.logits is None
    torch.testing.assert_close(output.loss, model(ids, labels=ids).loss, **FLOAT32)
    assert (output.loss - before).abs() > 0.1
    model.lm_head.__class__ = nn.Linear
    model.lm_head.register_forward_hook(lambda module, args, result: result * 3)
    torch.testing.assert_close(model(ids, labels=ids, skip_logits=True).loss, output.loss, **FLOAT32)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from dynamo itself
def test_a_subclass_compiles_in_one_graph():
    class Another(MinGRUForCausalLM):
        pass

    model, ids = Another(make_model().config), torch.randint(40, (2, 9))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, **FLOAT32)
    loss = compiled(ids, labels=ids, skip_logits=True).loss
    torch.testing.assert_close(loss, model(ids, labels=ids).loss, **FLOAT32)


def test_another_loss_function_reads_the_logits():
    model, ids = make_model(), torch.randint(40, (2, 9))
    model.loss_function = lambda logits, labels, vocab_size: logits.square().mean()
    output = model(ids, labels=ids, skip_logits=True)
    assert output.logits is None
    torch.testing.assert_close(output.loss, model(ids).logits.square().mean())


def test_operations_are_counted_without_numbers():
    counts = []
    for device in ("cpu", "meta"):
        model, ids = make_model().to(device), torch.zeros(3, 12, dtype=torch.long, device=device)
        with FlopCounterMode(display=False) as counter:
            model(ids, labels=ids, skip_logits=True).loss.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_mistakes_are_named():
    model, ids = make_model(), torch.randint(40, (2, 5))
    with pytest.raises(ValueError, match="skip_logits needs labels"):
        model(ids, skip_logits=True)
    with pytest.raises(ValueError, match=r"labels have the shape \(2, 4\), expected \(2, 5\)"):
        model(ids, labels=ids[:, :4], skip_logits=True)


@pytest.mark.parametrize("kind", ["autocast", "model"])
@pytest.mark.parametrize("scale", [1.0, 65536.0], ids=["plain", "loss scale"])
def test_float16_holds_the_sums_of_many_rows(kind, scale, monkeypatch):
    """The rows share a direction and one label is frequent: the sum over them overflows float16, the mean does not."""
    monkeypatch.setattr(mingru_hf.losses, "PIECE_ELEMENTS", 2**23)
    hidden = F.layer_norm(torch.randn(1, 120_000, 8) + 3 * torch.randn(8), (8,))
    labels = torch.where(torch.rand(1, 120_000) < 0.6, 5, torch.randint(64, (1, 120_000)))
    head = nn.Linear(8, 64)
    expected = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())
    gradients = torch.autograd.grad(expected * scale, head.parameters())
    assert 120_000 / scale * gradients[0].abs().max() > 1.2 * torch.finfo(torch.float16).max
    if kind == "model":
        head, hidden = head.half(), hidden.half()
    with torch.autocast("cpu", torch.float16, enabled=kind == "autocast"):
        loss = head_loss(hidden.requires_grad_(), head, None, shift_labels=labels)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    (loss * scale).backward()
    for parameter, gradient in zip(head.parameters(), gradients, strict=True):
        if gradient.abs().max() > torch.finfo(parameter.dtype).max:
            continue  # too large for the parameter itself
        assert (parameter.grad.float() - gradient).abs().max() <= 5e-3 * gradient.abs().max()
    assert hidden.grad.isfinite().all()
    assert hidden.grad.abs().max() > 0 or scale == 1.0
