"""Weights trained elsewhere -> a checkpoint: torchvision's `alexnet` and Caffe's two AlexNets."""
