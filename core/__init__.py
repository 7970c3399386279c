"""Shared ground of every stage: errors, artifacts and manifests, shapes, precisions, progress."""
