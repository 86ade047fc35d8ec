"""Builds the embedded models and the subject from openly licensed emoji artwork: fetch, render, train, write."""
