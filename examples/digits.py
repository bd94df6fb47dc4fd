"""What the examples train: 1 437 scanned digits of 8x8 pixels, 360 to test on, and a small net with batch norm."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def load() -> tuple[TensorDataset, TensorDataset]:
    """The training set and the test set: images [8, 8] with pixels from 0 to 1, and labels."""
    scans = load_digits()
    images = torch.tensor(scans.images, dtype=torch.float32) / 16
    labels = torch.tensor(scans.target)
    for_test = torch.arange(len(labels)) % 5 == 0
    return TensorDataset(images[~for_test], labels[~for_test]), TensorDataset(images[for_test], labels[for_test])


def make_model() -> nn.Module:
    """A net of one hidden layer, with the same weights at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))


@torch.no_grad()
def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    """The part of a data set's images that the model names correctly."""
    model.eval()
    num_right = 0
    for images, labels in DataLoader(dataset, batch_size=256):
        num_right += int((model(images).argmax(1) == labels).sum())
    model.train()
    return num_right / len(dataset)
