"""Compression: layers of fewer multiply-adds, fitted to what the layers they replace produce on real images."""
