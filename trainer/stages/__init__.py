"""One box of the way of the data a file. A stage composes rooms and does no arithmetic; stages never import stages."""
