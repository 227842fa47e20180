"""Tokens of captions as coco-caption has them, without Java.

coco-caption runs `PTBTokenizer -preserveLines -lowerCase` of Stanford CoreNLP 3.4.1 and drops a list of
punctuation. The rules here were written from what that tool does with strings of all kinds; `tests/data`
has such strings with its tokens. Brackets stay: the list has `-LRB-`, which after lower-casing is `-lrb-`.
"""

from __future__ import annotations

import re
import unicodedata

_LETTER = r"[^\W\d_\u00aa\u00b2\u00b3\u00b9\u00ba\u00bc-\u00be\u2070-\u209f\u2150-\u218f\u2460-\u24ff]"
_ALNUM = rf"(?:{_LETTER}[\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u2010\u2011\u00ad]*|\d)"
_APOSTROPHE = "['\u2019]"
_END = r"(?![^\W_])"

# Abbreviations that keep their full stop: always, if they begin with a capital, or before a number.
_ALWAYS = r"""
jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri dr mr mrs ms prof gen sen lt
col capt sgt maj cmdr adm rep gov rev hon pres supt mt ft st ste jr sr bros inc corp co ltd plc esq ave blvd
rd sq ct tel ext vs etc al cf ala ariz calif colo conn fla ga ind kan kans ky mich minn mo mont neb nev okla
penn tenn va vt wis wisc wyo dept bldg univ assn assoc asst est intl natl md msgr mme mlle adj adv elec pvt
pfc spc cpl messrs drs profs reps sens govs insp det bhd ph\.d ed\.d ph
""".split()
_CAPITALISED = "Miss Az Ark Del Ill La Mass Ore Pa Tex Wash".split()
_NUMBERED = "no nos pp fig figs art ca op prop".split()

_ATTRIBUTE = r"\s+[A-Za-z0-9_:.-]+(?:=\"[^\"]*\"|='[^']*')?"
_SITE = (
    r"www\.(?:[^\s\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}|(?:[^\s\"`'<>|.!?(){}\[\]/:,_$-]+\.)+(?:com|net|org|edu)"
)
_PATH = r"(?:/[^\s\"<>|()]+[^\s\"<>|.!?(){},-])?"
_FILES = "bmp|docx?|exe|gif|gz|html?|jpe?g|mov|mp[34]|avi|pdf|php|png|ppt|txt|wav|xml|zip"
_SLASH = r"\\?/"

# Of the patterns that match at a place the longest wins. Where one has a group, only that is the token: what
# follows in the pattern must be there, and is looked at next.
_PATTERNS = (
    # Words in two, and with apostrophes
    rf"(?i:(can)not|(gon|wan)na|(got)ta|(lem|gim)me)(?![\w{_APOSTROPHE[1:]})",
    rf"({_LETTER}+?)[Nn]['\u2019\u2018`][Tt]{_END}",
    rf"[Nn]['\u2019\u2018`][Tt]{_END}",
    rf"{_APOSTROPHE}(?i:s|d|m|ll|re|ve){_END}",
    rf"{_APOSTROPHE}[nN](?:{_APOSTROPHE}|(?=[\s-]|$))",
    rf"{_APOSTROPHE}(?i:em|til|till|cause){_END}",
    rf"{_APOSTROPHE}\d\d(?:s(?![\w{_APOSTROPHE[1:]})|(?=\s|$))",
    r"('[Tt])(?i:is|was)",
    rf"(?:{_ALNUM}+-)?[dDoOlL]{_APOSTROPHE}{_ALNUM}{{2,}}(?:-{_ALNUM}+)*",
    rf"([dljyDLJY]{_APOSTROPHE}){_LETTER}",
    rf"(?i:[eo]{_APOSTROPHE}er|ne{_APOSTROPHE}er|ma{_APOSTROPHE}am|c{_APOSTROPHE}mon|(?:cap|nat){_APOSTROPHE}[nl]){_END}",
    rf"(?i:[cn]{_APOSTROPHE}est|qu{_APOSTROPHE}(?:ils?|elles?|on)|ol{_APOSTROPHE}){_END}",
    rf"(?i:(?:hawai|ba|sana|ra|shi){_APOSTROPHE}(?:i|ath|a|anan|ite)){_END}",
    # Markup, addresses, names and tags of networks
    rf"</?[A-Za-z][A-Za-z0-9_:.-]*(?:{_ATTRIBUTE})*\s*/?>",
    r"<[!?][A-Za-z-][^>]*>",
    r"&#\d+;|&[aeiouAEIOU](?:acute|grave|uml);",
    r"(?i:https?)://[^\s\"<>|()]+[^\s\"<>|.!?(){},-]",
    rf"(?:{_SITE}){_PATH}",
    r"<?[A-Za-z0-9][^\s\"<>|()]*@(?:[^\s\"<>|().]+\.)*[^\s\"<>|().]+>?",
    r"@[A-Za-z_][A-Za-z_0-9]*",
    rf"#{_LETTER}+",
    # Words, alone and with points, hyphens and slashes within
    rf"{_ALNUM}+(?:_{_ALNUM}+)*",
    rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)+",
    rf"{_ALNUM}+\.(?i:{_FILES}){_END}",
    r"(?:[A-Za-z]\.)+",
    rf"{_ALNUM}(?:{_ALNUM}|[.,_])*+(?:-(?:(?:[A-Za-z]\.){{2,}}|{_ALNUM}+))+",
    rf"{_ALNUM}+(?:-[A-Za-z]+){{0,2}}(?:{_SLASH}{_ALNUM}+(?:-[A-Za-z]+){{0,2}}){{1,2}}",
    r"(?i:anti-)",
    r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+",
    r"[Cc]\+\+|[CF]#",
    # Abbreviations
    rf"(?i:{'|'.join(_ALWAYS)})\.",
    rf"(?:{'|'.join([*_CAPITALISED, *map(str.upper, _CAPITALISED)])}|[Mm]fg|[Pp]t[ey])\.",
    rf"(?i:{'|'.join(_NUMBERED)})\.(?=\s?\d)",
    # Numbers
    r"[-+]?(?:\d*(?:[.:,]\d+)+|\d+)",
    rf"\d{{1,4}}-\d{{1,4}}{_SLASH}\d{{1,4}}",
    r"\(\d{2,3}\)(?=\s\d{3,4}[\s-]\d{4})|\(\d{3}\)\d{3}-\d{4}",
    r"[A-Z]{0,3}\$",
    # Faces and runs of signs
    r"[<>]?[:;=]['o*-]?[()DPdpO\\{@|\[\]](?![A-Za-z0-9])",
    r"[-^x=~<>']_[-^x=~<>']",
    r"[!?]{2,}|-{5,}|_+|#+|@+|\\?\*+|<<|>>",
)
_LONGER = tuple(map(re.compile, _PATTERNS))
_PLAIN = re.compile(r"[A-Za-z]+(?=[ ]|$)")
_SPLIT = frozenset("cannot gonna wanna gotta lemme gimme".split())
_SPACE = re.compile(r"\s+|&(?:quot|apos|nbsp|mdash|ndash);|-{2,4}(?!-)", re.IGNORECASE)
_SUFFIX = re.compile(r"n?['\u2019\u2018`](?:s|d|m|ll|re|ve|t)", re.IGNORECASE)
_STRAIGHT = str.maketrans("\u2019\u2018", "'`")
_SIGN = re.compile(r"&(?:amp|lt|gt);|.", re.IGNORECASE | re.DOTALL)
_WRITTEN = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_WRITTEN |= {"&amp;": "&", "&lt;": "<", "&gt;": ">", "\u00a2": "cents", "\u00a3": "#"}
_WRITTEN |= {"\u20ac": "$", "\u00a4": "$", "\u00bd": "1/2", "\u00bc": "1/4", "\u00be": "3/4"}
_WRITTEN |= {"\u2153": "1/3", "\u2154": "2/3"}
# Punctuation that coco-caption drops, and signs that the lexer does not know.
_DROPPED = frozenset(
    ".?!,:;-'\"`\u2018\u2019\u201b\u201c\u201d\u00ab\u00bb\u2039\u203a\u2026\u2013\u2014\u2015"
    "\u2012\u2043\ufe63\u203c\u2027\u300c\u300d\u300e\u300f\u301c\u20a9\u20b9\u20bd"
)
_UNKNOWN = frozenset(["Cc", "Cf", "Cs", "Cn", "Co", "Mn", "Nl"])


def caption_tokens(caption: str) -> list[str]:
    """Lower-case tokens of a caption, without punctuation."""
    tokens: list[str] = []
    place = 0
    while place < len(caption):
        if (plain := _PLAIN.match(caption, place)) and plain.group().lower() not in _SPLIT:
            tokens.append(plain.group().lower())
            place = plain.end() + 1
        elif between := _SPACE.match(caption, place):
            place = between.end()
        else:
            token, place = _next(caption, place)
            tokens += token.lower().split()
    return tokens


def _next(caption: str, place: int) -> tuple[str, int]:
    """The token at a place, empty where it is dropped, and where the next one begins."""
    found = [match for pattern in _LONGER if (match := pattern.match(caption, place))]
    if found:
        longest = max(found, key=lambda match: match.end())
        group = longest.lastindex or 0
        return _plainly(longest.group(group)), longest.end(group)
    sign = _SIGN.match(caption, place)
    assert sign is not None
    text = sign.group().lower()
    if len(text) == 1 and (text in _DROPPED or text > "\uffff" or unicodedata.category(text) in _UNKNOWN):
        return "", sign.end()
    return _WRITTEN.get(text, text), sign.end()


def _plainly(token: str) -> str:
    """A token with brackets written out, no soft hyphens, and the apostrophe of a suffix straight."""
    if token.startswith("<") and token.endswith(">"):
        return token
    token = token.replace("(", "-lrb-").replace(")", "-rrb-").replace("&amp;", "&").replace("\u00ad", "")
    return token.translate(_STRAIGHT) if _SUFFIX.fullmatch(token) else token
