"""Teachers: their outputs, the test against chance, faster forms, images that can be made again."""
