"Print the requirements of settings.ini with each lower bound as an exact version: the oldest that should work."
from configparser import ConfigParser
from pathlib import Path

cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read(Path(__file__).parents[2]/'settings.ini', encoding='utf-8')
settings = cfg['DEFAULT']
for name in ('requirements', 'test_requirements'):
    print(*(o.replace('>=', '==') for o in settings[name].split()), sep='\n')
