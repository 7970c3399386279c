"""From a bundle to the files that other programs take: one module per target."""
