"""Backbones by name, weights they start from, and the way back to plain torchvision."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.base import clone
from torch import nn

from sklearn_sela import (
    SelfLabelClusterer,
    _recipe,
    torchvision_state_dict,
    torchvision_transform,
)
from sklearn_sela._backbones import convnet, feature_width, make_backbone

VECTORS = np.random.default_rng(0).normal(size=(60, 6))
SMALL = "shufflenet_v2_x0_5"
QUICK = {
    "max_epochs": 1,
    "over_clusters": None,
    "n_heads": 2,
    "n_neighbors": 3,
    "learning_rate": 0.01,
    "random_state": 0,
}
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def images(n=24, side=16, channels=3):
    """uint8 images of two kinds, dark and light on the left."""
    X = np.random.default_rng(0).integers(0, 128, (n, channels, side, side), dtype=np.uint8)
    X[::2, :, :, : side // 2] += 100
    return X


def clusterer(backbone, n_clusters=2, **parameters):
    return SelfLabelClusterer(n_clusters, backbone=backbone, **{**QUICK, **parameters})


def exported(estimator, stem=False):
    """torchvision's own network, with the weights of the estimator."""
    network = torchvision.models.get_model(estimator.backbone, num_classes=estimator.n_clusters_)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if stem else "error")
        network.load_state_dict(torchvision_state_dict(estimator), strict=True)
    if stem:
        network.conv1.stride, network.maxpool = (1, 1), nn.Identity()
    return network.eval()


@torch.no_grad()
def assert_predicts_the_same(network, estimator, X):
    x = torchvision_transform(estimator)(torch.from_numpy(X))
    p = network(x).softmax(1).numpy()
    np.testing.assert_allclose(p, estimator.predict_proba(X), rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(p.argmax(1), estimator.predict(X))


def trained(name):
    """Weights as of a network that somebody else trained: batch norm has seen something."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, num_classes=7)
    with torch.no_grad():
        network.train()(torch.rand(8, 3, 32, 32))
    return network.state_dict()


@pytest.fixture(scope="module")
def resnet_weights():
    return trained("resnet18")


@pytest.fixture(scope="module")
def fitted_resnet():
    """To images small enough for the small stem."""
    return clusterer("resnet18").fit(images())


@pytest.fixture(scope="module")
def small_weights():
    return trained(SMALL)


def changed(weights):
    return {key: 0.9 * value for key, value in weights.items()}


# Names and shapes


@pytest.mark.parametrize(
    ("name", "shape", "width"),
    [
        ("mlp", (6,), 128),
        ("mlp", (3, 8, 8), 128),
        ("convnet", (1, 8, 8), 128),
        ("alexnet", (3, 64, 64), 4096),
        ("alexnet", (1, 224, 224), 4096),
        ("resnet18", (1, 8, 8), 512),
        ("resnet18", (3, 96, 96), 512),
    ],
)
def test_features_of_a_backbone_by_name(name, shape, width):
    backbone = make_backbone(name, shape)
    assert feature_width(backbone, torch.zeros(2, *shape)) == width


def test_small_images_pass_the_stem_of_a_resnet_unreduced():
    def side(shape, weights=None):
        backbone, sizes = make_backbone("resnet18", shape, weights), []
        backbone.network.layer1.register_forward_pre_hook(lambda _, x: sizes.append(x[0].shape[-1]))
        backbone.eval()(torch.zeros(1, *shape))
        return sizes[0]

    assert side((3, 64, 64)) == 64
    assert side((1, 8, 8)) == 8
    assert side((3, 72, 72)) == 18
    conv = make_backbone("resnet18", (3, 64, 64)).network.conv1
    assert (conv.kernel_size, conv.stride) == ((3, 3), (1, 1))
    assert side((3, 64, 64), torchvision.models.resnet18().state_dict()) == 16  # theirs, as it is


def test_alexnet_has_batch_norm_after_each_convolution():
    kinds = [type(m) for m in make_backbone("alexnet", (3, 64, 64)).modules()]
    after = [kinds[i + 1] for i, kind in enumerate(kinds) if kind is nn.Conv2d]
    assert after == [nn.BatchNorm2d] * 5


@pytest.mark.parametrize(
    ("name", "closest"), [("resnet81", "resnet18"), ("ResNet50", "resnet50"), ("vgg16bn", "vgg16")]
)
def test_unknown_backbone_lists_the_closest_names(name, closest):
    with pytest.raises(ValueError, match=f"backbone='{name}' is unknown.*'{closest}'"):
        clusterer(name).fit(images())


@pytest.mark.parametrize("name", ["squeezenet1_0", "maxvit_t", "inception_v3", "googlenet"])
def test_networks_without_one_linear_layer_at_the_end_are_unknown(name):
    with pytest.raises(ValueError, match="is unknown"):
        clusterer(name).fit(images())


@pytest.mark.parametrize(
    ("name", "side", "enough"),
    [("alexnet", 32, 64), ("vit_b_32", 50, 64)],
)
def test_too_small_images_are_refused_with_a_size_that_will_do(name, side, enough):
    with pytest.raises(ValueError, match=rf"'{name}'.*{side} x {side}.*takes {enough} x {enough}"):
        clusterer(name).fit(images(side=side))


def test_vectors_and_many_channels_are_refused():
    with pytest.raises(ValueError, match=r"backbone='resnet18' needs images.*image_shape"):
        clusterer("resnet18").fit(VECTORS)
    with pytest.raises(ValueError, match="1 or 3 channels, not 5"):
        clusterer("resnet18").fit(images(channels=5))


# Export


@pytest.mark.parametrize(
    ("name", "side"),
    [("resnet18", 72), ("alexnet", 64), ("mobilenet_v3_small", 32), ("mnasnet0_5", 32)],
)
def test_exported_network_predicts_the_same_clusters(name, side):
    X = images(side=side)
    estimator = clusterer(name).fit(X)
    assert_predicts_the_same(exported(estimator), estimator, X)


def test_exported_resnet_of_small_images_predicts_the_same_with_its_stem_set(fitted_resnet):
    assert_predicts_the_same(exported(fitted_resnet, stem=True), fitted_resnet, images())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("convnext_tiny", {}),
        ("densenet121", {}),
        ("efficientnet_b0", {}),
        ("mobilenet_v2", {}),
        ("regnet_x_400mf", {}),
        ("shufflenet_v2_x0_5", {}),
        ("swin_t", {}),
        ("vit_b_32", {"image_size": 32}),
    ],
)
def test_networks_of_every_kind_are_torchvisions_own_but_for_the_last_layer(name, arguments):
    plain = torchvision.models.get_model(name, num_classes=5, **arguments).eval()
    state = plain.state_dict()
    backbone = make_backbone(name, (3, 32, 32), state).eval()
    last, x = plain.get_submodule(backbone.last), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(last(backbone(x)), plain(x))
    back = backbone.plain_state_dict()
    assert {key for key in state if not key.startswith(backbone.last)} == back.keys()
    assert all(torch.equal(value, state[key]) for key, value in back.items())


@pytest.mark.parametrize(
    ("shape", "dtype"), [((20, 16, 16), np.uint8), ((20, 1, 16, 16), np.float64)]
)
def test_grey_images(shape, dtype):
    X = images(20, channels=1).reshape(shape).astype(dtype)
    estimator = clusterer("resnet18").fit(X)
    network = exported(estimator, stem=True)
    x = torchvision_transform(estimator)(torch.from_numpy(X.reshape(20, 1, 16, 16)))
    assert x.shape == (20, 3, 16, 16)
    assert network.conv1.in_channels == 3
    with torch.no_grad():
        np.testing.assert_array_equal(network(x).argmax(1), estimator.labels_)


def test_small_stem_is_warned_of_where_predictions_depend_on_it(fitted_resnet):
    with pytest.warns(UserWarning, match=r"conv1\.stride = 1, 1"):
        torchvision_state_dict(fitted_resnet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchvision_state_dict(fitted_resnet, classifier=False)


def test_body_of_a_detection_network_takes_the_weights():
    estimator = clusterer("resnet50", n_heads=1).fit(images(8, side=8))
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None
    )
    body = detector.backbone.body
    body.load_state_dict(torchvision_state_dict(estimator, classifier=False), strict=True)
    own = estimator.network_.backbone.network.layer4.state_dict()
    for key, value in body.layer4.state_dict().items():
        assert torch.equal(value, own[key])


def test_other_backbones_are_not_exported_but_have_a_transform():
    X = images()
    estimator = clusterer("convnet").fit(X)
    with pytest.raises(ValueError, match="backbone='convnet' is not torchvision's"):
        torchvision_state_dict(estimator)
    x = torchvision_transform(estimator)(torch.from_numpy(X))
    with torch.no_grad():
        labels = estimator.network_(x)[:, estimator.best_head_].argmax(1)
    np.testing.assert_array_equal(labels, estimator.labels_)
    with pytest.raises(ValueError, match="vectors"):
        torchvision_transform(clusterer("mlp").fit(VECTORS))


def test_transform_sees_files_as_predict_does(tmp_path):
    paths = []
    for i, x in enumerate(images(12, 40)):
        image = Image.fromarray(x.transpose(1, 2, 0)[:, : 30 + i])  # of several sizes
        turned = image.getexif()
        turned[0x0112] = 1 + i % 8
        paths.append(str(tmp_path / f"{i}.png"))
        image.save(paths[-1], exif=turned)
    estimator = clusterer(SMALL, image_shape=(3, 24, 24)).fit(paths)
    transform = torchvision_transform(estimator)
    network = exported(estimator)
    with torch.no_grad():
        p = network(torch.stack([*map(transform, paths)])).softmax(1)
    np.testing.assert_allclose(p, estimator.predict_proba(paths), rtol=1e-3, atol=1e-5)
    upright = Image.open(paths[0])
    torch.testing.assert_close(transform(upright), transform(paths[0]))
    assert transform(torch.zeros(2, 3, 50, 30)).shape == (2, 3, 24, 24)
    with pytest.raises(ValueError, match=r"\(1, 24, 24\)"):
        transform(torch.zeros(1, 24, 24))


def test_transform_is_a_step_of_torchvisions():
    from torchvision.transforms import v2

    X = images()
    transform = torchvision_transform(clusterer("convnet").fit(X))
    whole = v2.Compose([v2.ToImage(), transform])
    image = Image.fromarray(X[0].transpose(1, 2, 0))
    torch.testing.assert_close(whole(image), transform(image))
    torch.testing.assert_close(pickle.loads(pickle.dumps(transform))(image), transform(image))


# Weights to start from


def test_weights_from_a_file_and_a_mapping_are_the_same(tmp_path, small_weights):
    X = images()
    torch.save(small_weights, tmp_path / "weights.pt")
    one = clusterer(SMALL, weights=small_weights).fit(X)
    for path in (tmp_path / "weights.pt", str(tmp_path / "weights.pt")):
        two = clusterer(SMALL, weights=path).fit(X)
        np.testing.assert_array_equal(one.predict_proba(X), two.predict_proba(X))


def test_frozen_backbone_is_the_same_bit_for_bit(resnet_weights):
    X = images(40)
    estimator = clusterer(
        "resnet18", weights=resnet_weights, freeze=True, over_clusters=4, max_epochs=2, n_views=1
    ).fit(X)
    state = torchvision_state_dict(estimator, classifier=False)
    assert "bn1.running_mean" in state
    for key, value in state.items():
        assert torch.equal(value, resnet_weights[key]), key
    assert not any(p.requires_grad for p in estimator.network_.backbone.parameters())
    assert estimator.network_.heads.weight.requires_grad
    # and what torchvision's own network makes of ImageNet's scaling are the features
    network = torchvision.models.resnet18(num_classes=7)
    network.load_state_dict(resnet_weights)
    network.fc = nn.Identity()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = torchvision.transforms.functional.normalize(torch.from_numpy(X) / 255, mean, std)
    with torch.no_grad():
        features = network.eval()(x)
    np.testing.assert_allclose(features, estimator.transform(X), rtol=1e-3, atol=1e-4)


def test_trained_backbone_is_not_the_same(resnet_weights):
    estimator = clusterer("resnet18", weights=resnet_weights).fit(images())
    state = torchvision_state_dict(estimator, classifier=False)
    assert not torch.equal(state["conv1.weight"], resnet_weights["conv1.weight"])
    assert state["bn1.num_batches_tracked"] > resnet_weights["bn1.num_batches_tracked"]


def test_freeze_holds_for_a_module_of_ones_own():
    X = VECTORS
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    estimator = clusterer(module, freeze=True, over_clusters=6, max_epochs=4).fit(X)
    for key, value in estimator.network_.backbone.state_dict().items():
        assert torch.equal(value, module.state_dict()[key]), key
    assert all(p.requires_grad for p in module.parameters())  # the caller's is left alone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layer1.0.conv1.weight"), r"missing: layer1\.0\.conv1\.weight"),
        (lambda w: w.update(extra=torch.zeros(3)), "unexpected: extra"),
        (
            lambda w: w.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}),
            r"of other shape: conv1\.weight \(64, 3, 3, 3\), not \(64, 3, 7, 7\)",
        ),
        (lambda w: w.update(epoch=3), "tensors by name"),
        (lambda w: w.clear(), r"missing: bn1\.bias.*\.\.\."),
    ],
    ids=["missing", "unexpected", "shape", "no tensor", "empty"],
)
def test_weights_that_do_not_fit_name_the_keys(resnet_weights, change, message):
    weights = dict(resnet_weights)
    change(weights)
    with pytest.raises(ValueError, match=message):
        clusterer("resnet18", weights=weights).fit(images())


def test_classifier_of_the_weights_may_have_any_shape_or_none(resnet_weights):
    bare = {key: w for key, w in resnet_weights.items() if not key.startswith("fc.")}
    make_backbone("resnet18", (3, 32, 32), bare)
    make_backbone("resnet18", (3, 32, 32), resnet_weights)


def test_files_of_weights_that_are_none_are_refused(tmp_path):
    (tmp_path / "noise.pt").write_bytes(b"noise")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")  # would run code
    for name, message in [
        ("gone.pt", r"neither a file nor one of torchvision's \['IMAGENET1K_V1', 'DEFAULT'\]"),
        ("noise.pt", "noise.pt' holds no state dict"),
        ("list.pt", "must hold a state dict"),
        ("module.pt", "module.pt' holds no state dict"),
    ]:
        with pytest.raises(ValueError, match=message):
            clusterer("resnet18", weights=tmp_path / name).fit(images())


def test_weights_by_name_are_taken_from_the_cache_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"'DEFAULT' of 'shufflenet_v2_x0_5' are not on this mach"):
        make_backbone(SMALL, (3, 32, 32), "DEFAULT")
    kept = tmp_path / "hub" / "checkpoints"
    kept.mkdir(parents=True)
    theirs = torchvision.models.shufflenet_v2_x0_5().state_dict()
    url = torchvision.models.get_model_weights(SMALL).DEFAULT.url
    torch.save(theirs, kept / url.rsplit("/", 1)[1])
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    backbone = make_backbone(SMALL, (3, 32, 32), "DEFAULT")
    assert torch.equal(backbone.network.conv1[0].weight, theirs["conv1.0.weight"])


@pytest.mark.parametrize("backbone", ["auto", "convnet", nn.Flatten()])
def test_weights_of_other_backbones_are_refused(backbone, resnet_weights):
    with pytest.raises(ValueError, match="weights are for torchvision's networks"):
        clusterer(backbone, weights=resnet_weights).fit(images())


def test_alexnet_starts_from_torchvisions_weights():
    torch.manual_seed(0)
    plain = torchvision.models.alexnet()
    backbone = make_backbone("alexnet", (3, 64, 64), plain.state_dict()).eval()
    plain.classifier[6] = nn.Identity()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), plain.eval()(x), rtol=1e-3, atol=1e-5)


# What else must go on working


def test_clone_and_pickle(small_weights):
    X = images()
    estimator = clusterer(SMALL, weights=small_weights, freeze=True).fit(X)
    again = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_array_equal(again.predict_proba(X), estimator.predict_proba(X))
    assert not again.network_.train().backbone.training
    anew = clone(estimator).fit(X)
    np.testing.assert_array_equal(anew.predict_proba(X), estimator.predict_proba(X))


def test_first_rounds_are_remembered_by_what_the_weights_are(tmp_path, small_weights, monkeypatch):
    rounds_trained = []
    real = _recipe.self_label

    def counting(*args):
        rounds_trained.append(1)
        return real(*args)

    monkeypatch.setattr(_recipe, "self_label", counting)
    X, path = images(40), tmp_path / "weights.pt"

    def rounds(weights, **parameters):
        rounds_trained.clear()
        clusterer(
            SMALL,
            over_clusters=4,
            max_epochs=2,
            memory=str(tmp_path / "memory"),
            weights=weights,
            n_heads=1,
            **parameters,
        ).fit(X)
        return len(rounds_trained)

    torch.save(small_weights, path)
    assert rounds(path) == 2
    assert rounds(path) == rounds(small_weights) == 1
    assert rounds(path, freeze=True) == 2
    torch.save(changed(small_weights), path)
    assert rounds(path) == 2
    assert rounds(None) == 2


def test_checkpoints_know_the_weights_of_a_run(tmp_path, small_weights):
    X, path, folder = images(), tmp_path / "weights.pt", tmp_path / "run"
    torch.save(small_weights, path)
    clusterer(SMALL, weights=path, checkpoint_dir=folder).fit(X)
    clusterer(SMALL, weights=small_weights, checkpoint_dir=folder).fit(X)  # the same
    torch.save(changed(small_weights), path)
    with pytest.raises(ValueError, match="another run"):
        clusterer(SMALL, weights=path, checkpoint_dir=folder).fit(X)


def test_pooling_before_relu_changes_no_number():
    net = convnet((1, 28, 28))
    layers = list(net)
    pools = [i for i, layer in enumerate(net) if isinstance(layer, nn.MaxPool2d)]
    assert len(pools) == 3
    for i in pools:
        layers[i : i + 2] = layers[i + 1], layers[i]
    usual = copy.deepcopy(nn.Sequential(*layers))
    x = torch.randn(8, 1, 28, 28)
    assert (net(x) == usual(x)).all()
    for model in (net, usual):
        model(x).square().mean().backward()
    for own, other in zip(net.parameters(), usual.parameters(), strict=True):
        assert (own.grad == other.grad).all()
