"""Tools that check the tests."""
