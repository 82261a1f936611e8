"""A flat HoVLE in the forms that other engines read: a stock decoder, and its patch stem beside it."""
