"""tjx_trainer: the app that trains. Its parts are imported by module."""
