"""Drawings of samples for people: contact sheets and expert overviews."""
