"""Where images come from: every kind of source behind one contract."""
