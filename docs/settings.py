"settings.ini, which says where things are and whose they are"
from __future__ import annotations
from configparser import ConfigParser, SectionProxy
from pathlib import Path

def settings(root:Path)->SectionProxy: # of a checkout
    parser = ConfigParser(delimiters=['='])
    parser.read(root/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']
