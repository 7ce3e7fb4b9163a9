"""The small world that the demo models draw: shapes, colours, places, motions, words for them, an eye that reads them.

`world` draws scenes and words at random, `drawing` makes pictures of scenes, `analyser` reads scenes out of pictures.
"""
