"""The claims this library makes, and the code that tests each."""
