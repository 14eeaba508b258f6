"""The table handed on to other tools. Must not know: engines, learning, flows.

`job` an export from end to end; `selection` which rows, frozen; `journal` what is done of it, and how it is taken up
again; `rows` rows out of Parts; `originals` the images; `names` what files are called; `shape` what a format is;
`objects` and `polygons` what formats are made of; `coco`, `png`, `yolo`, `overlays`, `hugging_face`, `label_studio` one
format each.
"""
