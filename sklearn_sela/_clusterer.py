"""The estimator: parameters, validation, and scikit-learn's methods. No maths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.callback import CallbackSupportMixin, with_callbacks
from sklearn.utils.validation import check_is_fitted

from sklearn_sela._device import resolve_device
from sklearn_sela._distributed import Shards, launched
from sklearn_sela._fit import fit_estimator
from sklearn_sela._images import Images
from sklearn_sela._inputs import rows_of
from sklearn_sela._journal import Journal
from sklearn_sela._model import Model
from sklearn_sela._persistence import packed, unpacked
from sklearn_sela._saving import load_estimator, save_estimator
from sklearn_sela._selection import combined_score
from sklearn_sela._validation import check_parameters
from sklearn_sela._warnings import warn_of_skipped, warnings_of_first


class SelfLabelClusterer(
    CallbackSupportMixin,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
    BaseEstimator,
):
    """Deep clustering by self-labelling (SeLa), as a scikit-learn clusterer and transformer.

    Alternates between training a network on labels and re-labelling all samples by optimal
    transport, so that labels carry information about the data and cannot collapse [1]_. Fits
    in two rounds: an over-clustering that learns features, then the clusters asked for,
    started from the learned features (docs/recipe.rst says why, with measurements).

    Parameters
    ----------
    n_clusters : int, "auto" or sequence of int, default=8
        Number of clusters K, or numbers to choose from by what ``score`` looks at, on the
        features of the first round; eight take about half as long as a fit, 24 of small data
        two fits. "auto" is 2 to 25; fewer below 208 samples, and 2 alone below 32.
    n_heads : int, default=3
        Clustering heads that share the backbone: T of the paper. They start from different
        clusterings; the one whose labels agree best between views predicts. Of heads that
        agree about as well, it is the most informative.
    over_clusters : "auto", int or None, default="auto"
        Clusters of the first round; at most one per 8 samples. "auto" is 50, doubled until it
        is twice ``n_clusters``: few values, so that a search shares the round. None or 0 skips
        the round (the paper's way).
    backbone : str, torch.nn.Module or callable, default="auto"
        Maps a batch to features; whatever its output shape, it is flattened. A module is
        copied, never changed; a callable is called without arguments and returns one.
        "auto" takes the "convnet" for images, the "mlp" for vectors. "alexnet" is the paper's,
        with batch norm. Others are torchvision's classification networks by name, without
        the last layer: "resnet18", "vgg16_bn", "vit_b_16"; grey images are shown to them as
        colour, and ResNets learn images of at most 64 pixels without reducing them first. They
        often need a lower ``learning_rate``, 0.03 say.
        :func:`sklearn_sela.torchvision_state_dict` gives them back.
    weights : str, path or mapping, default=None
        Weights that a network of torchvision starts from: the file of a state dict, a state
        dict, or a name of torchvision's such as "DEFAULT" whose file is in torch's cache. Those
        of the last layer are ignored, all others must be there. uint8 images are then scaled
        by ImageNet's mean and deviation.
    freeze : bool, default=False
        Train the heads only: the backbone stays bit for bit what it was, with ``weights`` or
        as a module of your own.
    image_shape : tuple of int, default=None
        (height, width) or (channels, height, width) of images given as flat rows. None takes
        flat rows for vectors, unless ``backbone`` and ``augment`` are "auto" and the features
        are correlated like the pixels of square grey images, of 8 x 8 or more;
        ``image_shape_`` tells. Files are resized and cropped to it; None makes them colour
        images, square, of at most 64 pixels.
    on_bad_image : {"error", "skip"}, default="error"
        What to do about files that are missing or cannot be decoded: an error that names them
        before training starts, or do without. Skipped ones are listed in ``skipped_`` and get
        the label -1, and NaN for probabilities and features.
    augment : "auto", None or callable, default="auto"
        Random change of a batch (a scaled float32 tensor, on the device) that should not
        change clusters. "auto" is jitter for vectors; rotation, scale, shear and shift for grey
        images; random resized crops, colour jitter and greyscale for colour images; and mirroring
        of images if mirrored ones look like the data. Drawn for each sample.
    n_neighbors : "auto" or int, default="auto"
        Nearest neighbours (in 50 principal components) that may stand in for a sample: a
        second kind of view. "auto" is 10 for grey images, 20 for vectors, which have no
        augmentation to speak of, but at most an eighth of the samples, and in the second round
        at most half the samples per cluster. It is 0, which turns it off, for colour images, whose
        nearest neighbours often show something else.
    neighbor_probability : float, default=0.7
        Chance that a view shows a neighbour.
    init : {"kmeans", "random"} or array-like of int, default="kmeans"
        Labels that training starts from: k-means in principal components, the paper's random
        balanced ones, or given ones, (n_samples,) or (n_heads, n_samples), with
        ``over_clusters=None``. ``self_labels_`` of another fit and ``n_solves=0`` train a network
        on its labels (the paper's label transfer).
    soft_targets : bool, default=True
        Train on the soft assignment of the transport; False is the paper's hard labels.
    n_views : int, default=0
        Random views of each sample that a label solve looks at, in passes of their own (the
        paper's is 1). 0 takes what training predicted in the last epoch, at no cost.
    label_momentum : float, default=0.5
        Share of the last label solve's log-probabilities that the next one keeps, 0 to 1: a
        running mean over views (temporal ensembling, [2]_). The paper's is 0.
    n_solves : int, default=None
        Label solves of each round, dense early on as in the paper. None solves before every
        epoch but the first, 0 never.
    cluster_sizes : {"learned", "balanced"} or array-like of shape (n_clusters,), default="learned"
        Share of the samples each cluster gets. "learned" takes those of the clustering that
        the second round starts from, as a prior that pulls; where the data establish that
        sizes are equal, it is "balanced". "balanced" and given shares are held by the soft
        assignment, whose labels may be off by a few rows; cluster k gets the k-th share.
    reg : float, default=0.2
        Entropic regularisation of the label solve, in nats: 1 / lambda of the paper, whose
        values are lambda = 25 (ImageNet) and 10 (CIFAR).
    max_epochs : int, default=50
        Passes over the data, half of them in each round.
    n_iter_no_change : int, default=None
        A round ends once the loss has not fallen by more than ``tol`` in this many epochs. None
        runs all of them: much is gained at the end, while the "one_cycle" learning rate falls.
    tol : float, default=1e-3
        In nats: see ``n_iter_no_change``.
    batch_size : int, default=128
        Samples of one gradient step; less for small data, never under an eighth of them.
    learning_rate : float, default=0.1
        Peak step size of stochastic gradient descent (momentum 0.9).
    lr_schedule : {"one_cycle", "step"}, default="one_cycle"
        Warm up and cool down in each round, or divide by 10 after 40, 60 and 80 % (paper).
    weight_decay : float, default=5e-4
        L2 penalty on the weights (the paper's CIFAR value).
    device : str or torch.device, default="auto"
        "cpu", "cuda" or "cuda:N"; "auto" takes CUDA where there is one.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        Of the products in training; weights, labels and predictions stay float32. "auto" is
        bfloat16 on GPUs that have it, float32 elsewhere.
    compile : bool, default=False
        Train a backbone that ``torch.compile`` has compiled. Worth its minute or so in long runs
        on a GPU; needs a C++ compiler.
    distributed : {"auto", "own_rows"} or None, default="auto"
        In processes that ``torchrun`` has started, or of an initialised ``torch.distributed``,
        fit together. With "auto" all are given the same X, and each works on a share of its
        samples; with "own_rows" each is given samples of its own, as a Dataset say, and
        ``labels_`` are those of the first process, then the second's, and so on. None fits in
        this process alone. After ``fit`` all have the same estimator (docs/distributed.rst).
    random_state : int, RandomState instance or None, default=None
        Decides everything on a given machine and number of threads, except an ``augment``
        or ``backbone`` that draws from other generators than torch's global one (NumPy's,
        say); global generators are left as they were.
    memory : str or joblib.Memory, default=None
        Where to keep what first rounds learned, as in ``Pipeline``. Fits that differ only in
        ``n_clusters``, ``cluster_sizes`` or ``verbose`` share one, if ``random_state`` is an
        int: a search over them takes about half the time. Training data are not kept. Not with
        a ``backbone`` or ``augment`` of your own: code that changed could not be told.
    checkpoint_dir : str or Path, default=None
        Folder that keeps the run: after every epoch, all that training needs to go on, in place
        of what was there. The same call resumes it, and ends as it would have without the
        interruption (on the CPU; with no ``random_state``, it keeps the seed it began with). One
        folder a run.
    verbose : int, default=0
        1 prints a line an epoch.

    Attributes
    ----------
    labels_ : ndarray of shape (n_samples,)
        Cluster of each training sample; equal to ``predict`` of the training data. -1 for files
        that were skipped.
    skipped_ : list of str
        Files that could not be read, with ``on_bad_image="skip"``.
    n_clusters_ : int
        Number of clusters fitted.
    n_clusters_scores_ : pandas.DataFrame or None
        A row per number of clusters compared: n_clusters, score, its factors (silhouette,
        view_agreement, head_agreement: see ``criteria``) and support, the share of resamples
        of the samples, seen by any of the heads, in which this number scores best. Spread over
        several, any of them will do; another seed may still choose another. None if there was
        nothing to choose.
    self_labels_ : ndarray of shape (n_heads, n_samples)
        The transport's own last assignments, a row per head.
    best_head_ : int
        The head that predicts.
    cluster_sizes_ : ndarray of shape (n_clusters_,)
        Share of the samples that each of its clusters was asked to get.
    network_ : torch.nn.Module
        The trained network: ``backbone`` and ``heads``.
    n_iter_ : int
        Epochs run.
    loss_ : float
        Cross-entropy of the last epoch, in nats, mean over heads.
    history_ : pandas.DataFrame
        A row per epoch: epoch, stage ("features" or "clusters"), n_clusters (of the round), loss
        (ln n_clusters if nothing were learned), seconds, solver_iterations, marginal_error,
        changed (share of samples whose label changed), smallest and largest (cluster, in samples).
    image_shape_ : tuple of int or None
        (channels, height, width) of images; None for vectors.
    n_features_in_ : int
        Values per sample.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Column names, when X is a DataFrame with string names.

    Notes
    -----
    Vectors are standardised, images scaled per channel, a batch at a time: X is not copied
    whole, unless it is a list or a bfloat16 tensor, which NumPy has no type for, and may be a
    read-only memmap. Small batches train on one CPU thread, which
    more would only slow down. Fits in one process run one after another, for torch's global
    generator, which users' modules draw from, is one per process.

    References
    ----------
    .. [1] Asano, Rupprecht, Vedaldi. Self-labelling via simultaneous clustering and
       representation learning. ICLR 2020.
    .. [2] Laine, Aila. Temporal ensembling for semi-supervised learning. ICLR 2017.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_sela import SelfLabelClusterer
    >>> X = load_digits().images[:300]
    >>> clusterer = SelfLabelClusterer(n_clusters=10, max_epochs=4, random_state=0).fit(X)
    >>> clusterer.predict_proba(X).shape, clusterer.transform(X).shape
    ((300, 10), (300, 128))
    """

    # Of the page that notebooks link to, and show the documentation of parameters from.
    _doc_link_module = "sklearn_sela"
    _doc_link_template = Path(__file__).with_name("documentation.html").as_uri()

    def __init__(
        self,
        n_clusters: int | str | Sequence[int] = 8,
        *,
        n_heads: int = 3,
        over_clusters: int | str | None = "auto",
        backbone: Any = "auto",
        weights: Any = None,
        freeze: bool = False,
        image_shape: tuple[int, ...] | None = None,
        on_bad_image: str = "error",
        augment: Any = "auto",
        n_neighbors: int | str = "auto",
        neighbor_probability: float = 0.7,
        init: Any = "kmeans",
        soft_targets: bool = True,
        n_views: int = 0,
        label_momentum: float = 0.5,
        n_solves: int | None = None,
        cluster_sizes: Any = "learned",
        reg: float = 0.2,
        max_epochs: int = 50,
        n_iter_no_change: int | None = None,
        tol: float = 1e-3,
        batch_size: int = 128,
        learning_rate: float = 0.1,
        lr_schedule: str = "one_cycle",
        weight_decay: float = 5e-4,
        device: Any = "auto",
        precision: str = "auto",
        compile: bool = False,
        distributed: str | None = "auto",
        random_state: Any = None,
        memory: Any = None,
        checkpoint_dir: Any = None,
        verbose: int = 0,
    ):
        self.n_clusters = n_clusters
        self.n_heads = n_heads
        self.over_clusters = over_clusters
        self.backbone = backbone
        self.weights = weights
        self.freeze = freeze
        self.image_shape = image_shape
        self.on_bad_image = on_bad_image
        self.augment = augment
        self.n_neighbors = n_neighbors
        self.neighbor_probability = neighbor_probability
        self.init = init
        self.soft_targets = soft_targets
        self.n_views = n_views
        self.label_momentum = label_momentum
        self.n_solves = n_solves
        self.cluster_sizes = cluster_sizes
        self.reg = reg
        self.max_epochs = max_epochs
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.lr_schedule = lr_schedule
        self.weight_decay = weight_decay
        self.device = device
        self.precision = precision
        self.compile = compile
        self.distributed = distributed
        self.random_state = random_state
        self.memory = memory
        self.checkpoint_dir = checkpoint_dir
        self.verbose = verbose

    @with_callbacks
    def fit(self, X: Any, y: Any = None) -> SelfLabelClusterer:
        """Learn features and clusters of X.

        Parameters
        ----------
        X : array-like, DataFrame, tensor, paths, folder or torch Dataset
            (n_samples, n_features) vectors or flat images; (n_samples, height, width) or
            (n_samples, channels, height, width) images. Integers or floats. Or image files: a
            sequence of paths, or a folder, which stands for ``image_paths(folder)``. Or a
            map-style torch Dataset of images or vectors, or of tuples that begin with one.
        y : array-like, default=None
            Not learned from: only shown to callbacks, whose scorers may compare clusters with it.

        Returns
        -------
        self
            Fitted estimator. Ctrl-C keeps the last complete epoch and warns.

        Raises
        ------
        ValueError
            For X or a parameter out of range.
        TypeError
            For X or a parameter of the wrong kind, such as a torch DataLoader.
        OSError
            For a ``checkpoint_dir`` that cannot be written.
        FloatingPointError
            When the loss is not finite. Whatever is raised, an estimator that was fitted
            before stays as it was.
        """
        check_parameters(self)
        shards = Shards() if self.distributed is None else launched()
        device = resolve_device(self.device, shards.local_rank)
        several = isinstance(self.n_clusters, str) or np.size(self.n_clusters) > 1
        context = None
        if shards.rank == 0:
            n_rounds = 1 + bool(self.over_clusters) + several
            context = self._init_callback_context(max_subtasks=n_rounds)
        journal = Journal(self, context, X, y, shards)
        before = self.__dict__.copy()
        try:
            with warnings_of_first(shards):
                journal.begin(context)
                fit_estimator(self, X, device, journal)
                journal.end(context, lambda: self.__dict__)
        except BaseException:  # also Ctrl-C: an estimator that was fitted stays as it was
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        return self

    def fit_predict(self, X: Any, y: Any = None, **params: Any) -> NDArray[np.int64]:
        """Fit, and return ``labels_``; X and y as in ``fit``."""
        return self.fit(X, y, **params).labels_

    def predict(self, X: Any) -> NDArray[np.int64]:
        """Cluster of each sample.

        Returns
        -------
        ndarray of shape (n_samples,), int64
            Independent of the company and order of the samples, like all below.
        """
        return self._apply(Model.labels, X)

    def predict_proba(self, X: Any) -> NDArray[np.float32]:
        """Probability of each cluster, ndarray of shape (n_samples, n_clusters), float32."""
        return self._apply(Model.probabilities, X)

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Learned features: the backbone's output, (n_samples, n_features_out), float32."""
        return self._apply(Model.features, X)

    def confidence(self, X: Any) -> NDArray[np.float32]:
        """How far to trust the label of each sample, ndarray (n_samples,), float32, 0 to 1.

        The mean over heads of the probability that each gives to the label. What a cluster of
        another head means is read off the training samples: the share of it with that label.
        Low where the sample lies between clusters, and where heads that started from
        different clusterings draw the line differently; not, as a rule, far from all data.
        """
        return self._apply(Model.confidence, X)

    def score(self, X: Any, y: Any = None) -> float:
        """How good the clusters of X are, without classes; higher is better, at most 1.

        Silhouette x view agreement squared x head agreement: see :meth:`criteria`. Comparable
        between numbers of clusters, as ``GridSearchCV`` needs; 0 for one cluster. The same X
        always gets the same score. y is ignored.
        """
        found = self.criteria(X)
        names = ("silhouette", "view_agreement", "head_agreement")
        return float(combined_score(*(found[name] for name in names)))

    def criteria(self, X: Any) -> dict[str, float]:
        """What tells a good clustering of X without classes; higher is better, at most 1.

        Of more than 5,000 samples, 5,000 are looked at, the same each time.

        Returns
        -------
        dict of str to float
            silhouette : mean over at most 2,000 samples, of ``transform`` features of unit
            length; are clusters separated?
            view_agreement : Cohen's kappa between the labels of two random views of a sample;
            are they found again?
            head_agreement : adjusted mutual information of the predicting head's labels with
            each other head's, mean, of the same 2,000; 1 if there is one head. Do they find
            the same?
            information : :func:`sklearn_sela.metrics.information_score`.
        """
        return self._apply(Model.criteria, X)

    def _apply(self, use: Callable[[Model, Any], Any], X: Any) -> Any:
        """What a use of the model makes of X."""
        check_is_fitted(self)
        rows = rows_of(self, X, reset=False)
        made = use(self._model, rows)
        if isinstance(rows, Images) and rows.bad:
            warn_of_skipped([rows.name(i) for i in sorted(rows.bad)], len(rows))
        return made

    def save(self, path: Any) -> None:
        """Write the fitted estimator to a file without code, that :meth:`load` reads.

        safetensors: weights and other arrays, the rest as JSON, and a checksum of all of it.

        Parameters
        ----------
        path : str or Path
            Replaced whole if it is there.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        ValueError, TypeError
            For parameters, set since, that ``fit`` would refuse.
        OSError
            For a path that cannot be written.
        """
        save_estimator(self, path)

    @classmethod
    def load(cls, path: Any, **given: Any) -> SelfLabelClusterer:
        """Read an estimator from a file of :meth:`save`; no code runs from it.

        Parameters
        ----------
        path : str or Path
            Of the file.
        **given : dict
            Parameters that were code when it was saved, such as a ``backbone`` of your own, an
            ``augment`` that is a function, or a ``RandomState``. An error names those missing.
            For predictions alone, None will do for ``random_state`` and ``memory``.

        Returns
        -------
        SelfLabelClusterer
            That predicts the same, on ``device`` where this machine has that, else on the CPU.

        Raises
        ------
        ValueError
            For another file, one that has changed since it was saved, and missing parameters.
        OSError
            For a file that cannot be read.
        """
        return load_estimator(cls, path, given)

    def __getstate__(self) -> dict[str, Any]:
        return packed(super().__getstate__())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(unpacked(state))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags
