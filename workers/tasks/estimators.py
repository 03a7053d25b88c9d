"""Estimators that only need sums, on shipped tables. No torch."""

from __future__ import annotations

from workers.estimators import PCA, EstimatorDefinition, KMeans, MultinomialBayes, Ridge
from workers.tasks.tables import PATIENTS, PIXELS, PROGRESSION_MEAN, PROGRESSION_SCALE, load_diabetes, load_digits

DIABETES_RIDGE = EstimatorDefinition(
    name="diabetes-ridge",
    summary="disease progression after a year, ridge regression from sums",
    estimator=Ridge(features=10, l2=0.01, target_mean=PROGRESSION_MEAN, target_scale=PROGRESSION_SCALE),
    load=load_diabetes,
    preprocess=PATIENTS,
)

DIGITS_BAYES = EstimatorDefinition(
    name="digits-bayes",
    summary="small handwritten digits, multinomial naive Bayes from sums",
    estimator=MultinomialBayes(features=64, classes=10),
    load=load_digits,
    preprocess=PIXELS,
)

DIGITS_KMEANS = EstimatorDefinition(
    name="digits-kmeans",
    summary="small handwritten digits in ten clusters, k-means",
    estimator=KMeans(features=64, clusters=10),
    load=load_digits,
    preprocess=PIXELS,
)

DIGITS_PCA = EstimatorDefinition(
    name="digits-pca",
    summary="small handwritten digits, ten principal components from sums",
    estimator=PCA(features=64, components=10),
    load=load_digits,
    preprocess=PIXELS,
)
