"""Many pictures, one question: answers as JSON lines, fast, and nothing lost when the work is interrupted."""
