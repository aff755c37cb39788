"""Short common words, from which tasks are made: data, without meaning of their own."""

_WORDS = """
able acid army atom bake ball band bank bell bird blue boat bone book bowl bread brick bridge
cake call calm camp card case cave chair chalk cheese city clay clock cloud coal coat coin cold
cook corn cream crop crow dance dark dawn deer desk dish door drum duck dust eagle earth east easy
edge egg even exit face farm fence fern field fire fish flag flour flute fog fold fork fox frame
frog fruit game gate gift glass glove goat gold good grain grape grass gray green half hall hand
harbor hat hawk hill hive home honey horn horse house ice idea inch ink iron island item ivory jade
jam jar jewel join joke jump just keep kettle key kind king kite knot lake lamp land leaf lemon
letter light lime lion long lunch map maple march mask meal melon milk mill mint mirror moon moss
mouse music nail name neck nest net nice night noon north oak oat ocean olive onion open oral orange
oven over owl page paint palm paper park path peach pear pen piano pine pink plum poem pond pool
pure quail queen quick quiet quilt rain red reed rice ring river road robin rock roof room root rope
rose safe sail salt sand seal seed sheep shell ship shoe silk silver snow soap song soup south spoon
star stone storm string sugar sun table tail tall tea tent thread tide tiger time tower town train
tree tulip turtle unit upon urge use valley vase vast vein very violin vote voyage wagon wall water
wave well west whale wheat wheel willow wind wing wolf wood wool yard yarn year yell yellow your
zebra zero zinc zone zoom
"""


_NAMES = """
Ada Ali Amy Ana Ben Bob Cal Dan Dee Eli Eva Fay Gil Gus Ida Ian Ivy Jan Jim Joy Kai Kim Lea
Leo Lou Mae Max Mia Ned Nia Ola Pam Ray Rex Rio Roy Sam Sue Tom Una Val Wes Zoe
"""

_RISKY = """
arson assault blackmail bomb burglary cocaine explosive forgery fraud grenade gun heroin hostage
knife malware murder phishing poison ransom robbery smuggling spyware stalking theft threat torture
toxin venom virus weapon
"""

WORDS: tuple[str, ...] = tuple(_WORDS.split())

EASY_WORDS: tuple[str, ...] = tuple(word for word in WORDS[::4] if len(word) <= 5)
"""Few enough that a model of a million parameters learns them all by heart."""

NAMES: tuple[str, ...] = tuple(_NAMES.split())

RISKY_WORDS: tuple[str, ...] = tuple(_RISKY.split())
"""Words of crimes and dangers, for requests that only sound like them."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"
