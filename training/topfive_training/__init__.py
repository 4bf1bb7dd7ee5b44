"""From images to a checkpoint: AlexNet (Krizhevsky, Sutskever, Hinton 2012) on one or many GPUs."""
