"""The words of the generated English-German phrasebook and the endings they take; data only, no sentences.

Letters say what goes with what. Nouns: P person, p person who is somebody's, Q relative, A animal, K fruit,
F other countable food, M uncountable food, D drink, f sold fresh, R print, L things one writes, T object, C clothes,
V vehicle, B building, U sight, N place at home or outdoors, W furniture, c seats and beds, O can be opened,
E electric, J baked, H cooked, Y lies, Z stands. Places: h at home, t institution, s shop, n outdoors, c town,
w water, r where one orders, a where one arrives.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Noun:
    """`gender` is m, f or n; a `weak` noun takes the form of its plural in every case but the nominative."""

    english: str
    english_plural: str | None
    german: str
    gender: str
    german_plural: str | None
    classes: str
    weak: bool = False

    @property
    def is_mass(self) -> bool:
        return "M" in self.classes or "D" in self.classes


@dataclass(frozen=True)
class Adjective:
    """`stem` takes the endings, `german` stands after the verb; only some are compared."""

    english: str
    german: str
    stem: str
    classes: str
    english_comparative: str | None
    german_comparative: str | None


@dataclass(frozen=True)
class Verb:
    """`objects` are noun classes, `places` place letters; `kind` is "action", "event" (never -ing) or "state"."""

    english: str
    past: str
    ing: str
    german: str
    third: str
    participle: str
    prefix: str
    auxiliary: str
    kind: str
    subjects: str
    objects: str
    places: str
    preposition: str
    case: str


@dataclass(frozen=True)
class Place:
    """A noun and the prepositions of being there and of going there; "zu" takes the dative, the others change case."""

    noun: Noun
    english_at: str
    english_to: str
    german_at: str
    german_to: str
    letter: str


@dataclass(frozen=True)
class Determiner:
    """`stem` plus the ending in `article`; `adjective` are the endings of the adjectives that follow."""

    stem: str
    article: dict[str, tuple[str, ...]]
    adjective: dict[str, tuple[str, ...]]


# Endings by gender (p: plural of all three); each row is nominative, accusative, dative.
CASES = ("nominative", "accusative", "dative")
DEFINITE = {
    "m": ("der", "den", "dem"),
    "f": ("die", "die", "der"),
    "n": ("das", "das", "dem"),
    "p": ("die", "die", "den"),
}
STRONG = {"m": ("er", "en", "em"), "f": ("e", "e", "er"), "n": ("es", "es", "em"), "p": ("e", "e", "en")}
EIN = {"m": ("", "en", "em"), "f": ("e", "e", "er"), "n": ("", "", "em"), "p": ("e", "e", "en")}
WEAK = {"m": ("e", "en", "en"), "f": ("e", "e", "en"), "n": ("e", "e", "en"), "p": ("en", "en", "en")}
MIXED = {"m": ("er", "en", "en"), "f": ("e", "e", "en"), "n": ("es", "es", "en"), "p": ("en", "en", "en")}
INVARIABLE = dict.fromkeys("mfnp", ("", "", ""))

# "no" is the determiner inside a negated English clause ("not a", "not any").
DETERMINERS = {
    "": Determiner("", INVARIABLE, STRONG),
    "the": Determiner("", DEFINITE, WEAK),
    "this": Determiner("dies", STRONG, WEAK),
    "every": Determiner("jed", STRONG, WEAK),
    "which": Determiner("welch", STRONG, WEAK),
    "many": Determiner("viel", STRONG, STRONG),
    "a": Determiner("ein", EIN, MIXED),
    "no": Determiner("kein", EIN, MIXED),
    "my": Determiner("mein", EIN, MIXED),
    "your": Determiner("dein", EIN, MIXED),
    "his": Determiner("sein", EIN, MIXED),
    "her": Determiner("ihr", EIN, MIXED),
    "our": Determiner("unser", EIN, MIXED),
}

# English subject and object, German nominative, accusative and dative, index of the verb form.
PRONOUNS = (
    ("I", "me", "ich", "mich", "mir", 0),
    ("you", "you", "du", "dich", "dir", 1),
    ("he", "him", "er", "ihn", "ihm", 2),
    ("she", "her", "sie", "sie", "ihr", 2),
    ("we", "us", "wir", "uns", "uns", 3),
    ("they", "them", "sie", "sie", "ihnen", 5),
)
PRESENT = {
    "sein": ("bin", "bist", "ist", "sind", "seid", "sind"),
    "wissen": ("weiß", "weißt", "weiß", "wissen", "wisst", "wissen"),
}
PRETERITE = {
    "sein": ("war", "warst", "war", "waren", "wart", "waren"),
    "haben": ("hatte", "hattest", "hatte", "hatten", "hattet", "hatten"),
}
MODALS = {
    "can": ("kann", "kannst", "kann", "können", "könnt", "können"),
    "have to": ("muss", "musst", "muss", "müssen", "müsst", "müssen"),
    "want to": ("will", "willst", "will", "wollen", "wollt", "wollen"),
    "be allowed to": ("darf", "darfst", "darf", "dürfen", "dürft", "dürfen"),
    "should": ("sollte", "solltest", "sollte", "sollten", "solltet", "sollten"),
    "would like to": ("möchte", "möchtest", "möchte", "möchten", "möchtet", "möchten"),
    "like to": (),  # German: the adverb gern
}
CONTRACTIONS = {"in dem": "im", "in das": "ins", "an dem": "am", "an das": "ans", "zu dem": "zum", "zu der": "zur"}
RELATIONS = (("on", "auf"), ("under", "unter"), ("next to", "neben"), ("in front of", "vor"), ("behind", "hinter"))
VEHICLES = (("by train", "mit dem Zug"), ("by car", "mit dem Auto"), ("by bicycle", "mit dem Fahrrad"))
DEGREES = (("very", "sehr"), ("rather", "ziemlich"), ("not", "nicht"), ("", ""))

# 0 to 19 and the tens of each language.
NUMBER_TABLE = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen;- ten twenty thirty forty fifty sixty seventy eighty ninety;
    null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn
    siebzehn achtzehn neunzehn;- zehn zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig"""

# English singular and plural, German singular, gender (w: masculine and weak), plural; "-" for a plural not used.
NOUN_TABLE = {
    "P": """man men Mann m Männer; woman women Frau f Frauen; girl girls Mädchen n Mädchen; boy boys Junge w Jungen;
        farmer farmers Bauer w Bauern; singer singers Sänger m Sänger; artist artists Künstler m Künstler;
        nurse nurses Krankenschwester f Krankenschwestern; king kings König m Könige;
        queen queens Königin f Königinnen; judge judges Richter m Richter; policeman policemen Polizist w Polizisten;
        saleswoman saleswomen Verkäuferin f Verkäuferinnen""",
    "Pp": """child children Kind n Kinder; teacher teachers Lehrer m Lehrer; doctor doctors Arzt m Ärzte;
        cook cooks Koch m Köche; neighbour neighbours Nachbar w Nachbarn; student students Student w Studenten;
        guest guests Gast m Gäste; baker bakers Bäcker m Bäcker; friend friends Freund m Freunde""",
    "PpQ": """mother - Mutter f -; father - Vater m -; brother brothers Bruder m Brüder;
        sister sisters Schwester f Schwestern; grandmother - Großmutter f -; grandfather - Großvater m -;
        daughter daughters Tochter f Töchter; son sons Sohn m Söhne; aunt aunts Tante f Tanten;
        uncle uncles Onkel m Onkel""",
    "A": """dog dogs Hund m Hunde; cat cats Katze f Katzen; horse horses Pferd n Pferde; bird birds Vogel m Vögel;
        cow cows Kuh f Kühe; pig pigs Schwein n Schweine; rabbit rabbits Kaninchen n Kaninchen;
        duck ducks Ente f Enten; bear bears Bär w Bären; donkey donkeys Esel m Esel""",
    "Kf": """apple apples Apfel m Äpfel; tomato tomatoes Tomate f Tomaten; pear pears Birne f Birnen;
        strawberry strawberries Erdbeere f Erdbeeren; cherry cherries Kirsche f Kirschen""",
    "FfH": "egg eggs Ei n Eier; potato potatoes Kartoffel f Kartoffeln",
    "Ff": "sausage sausages Wurst f Würste",
    "FJ": "cake cakes Kuchen m Kuchen; biscuit biscuits Keks m Kekse; roll rolls Brötchen n Brötchen",
    "Mf": "meat - Fleisch n -; fish - Fisch m -; salad - Salat m -; cheese - Käse m -",
    "M": "chocolate - Schokolade f -; honey - Honig m -",
    "MJf": "bread - Brot n -",
    "MH": "soup - Suppe f -; rice - Reis m -",
    "D": """milk - Milch f -; water - Wasser n -; coffee - Kaffee m -; tea - Tee m -; juice - Saft m -;
        lemonade - Limonade f -""",
    "RY": """book books Buch n Bücher; newspaper newspapers Zeitung f Zeitungen; novel novels Roman m Romane;
        magazine magazines Zeitschrift f Zeitschriften""",
    "LY": """letter letters Brief m Briefe; report reports Bericht m Berichte; poem poems Gedicht n Gedichte;
        postcard postcards Postkarte f Postkarten""",
    "L": "story stories Geschichte f Geschichten; message messages Nachricht f Nachrichten",
    "TY": """key keys Schlüssel m Schlüssel; spoon spoons Löffel m Löffel; knife knives Messer n Messer;
        fork forks Gabel f Gabeln; umbrella umbrellas Regenschirm m Regenschirme;
        pencil pencils Bleistift m Bleistifte; blanket blankets Decke f Decken; picture pictures Bild n Bilder""",
    "TZ": """cup cups Tasse f Tassen; plate plates Teller m Teller; basket baskets Korb m Körbe;
        candle candles Kerze f Kerzen""",
    "TOZ": """bottle bottles Flasche f Flaschen; suitcase suitcases Koffer m Koffer; box boxes Kiste f Kisten;
        bag bags Tasche f Taschen""",
    "E": """television televisions Fernseher m Fernseher; camera cameras Kamera f Kameras;
        washing_machine washing_machines Waschmaschine f Waschmaschinen""",
    "TEZ": "lamp lamps Lampe f Lampen",
    "CY": """shirt shirts Hemd n Hemden; dress dresses Kleid n Kleider; coat coats Mantel m Mäntel;
        jacket jackets Jacke f Jacken; hat hats Hut m Hüte; skirt skirts Rock m Röcke; cap caps Mütze f Mützen""",
    "V": """car cars Auto n Autos; bicycle bicycles Fahrrad n Fahrräder; boat boats Boot n Boote;
        lorry lorries Lastwagen m Lastwagen; motorcycle motorcycles Motorrad n Motorräder""",
    "B": "house houses Haus n Häuser",
    "BU": """church churches Kirche f Kirchen; bridge bridges Brücke f Brücken; tower towers Turm m Türme;
        castle castles Schloss n Schlösser""",
    "W": "table tables Tisch m Tische; desk desks Schreibtisch m Schreibtische",
    "Wc": "chair chairs Stuhl m Stühle; bed beds Bett n Betten; bench benches Bank f Bänke",
}

# English, German, classes of nouns (S: a passing state, so that it goes with a time), comparatives where used.
ADJECTIVE_TABLE = """big groß ATVBFKWN bigger größer; tall groß P taller größer;
    small klein PATVBFCKWN smaller kleiner; old alt PARLTCVBEW older älter;
    young jung PA younger jünger; new neu RTCVBEW newer neuer;
    beautiful schön TCVBN; ugly hässlich TCVBW uglier hässlicher; long lang RL longer länger;
    short kurz RL shorter kürzer; interesting interessant RL; boring langweilig RL; important wichtig L;
    funny lustig PRL funnier lustiger; friendly freundlich P friendlier freundlicher; polite höflich P;
    tired müde PAS; hungry hungrig PAS; thirsty durstig PAS; rich reich P richer reicher; poor arm P poorer ärmer;
    clever klug PA cleverer klüger; famous berühmt PU; lazy faul PA lazier fauler; hard-working fleißig P;
    sad traurig PSL sadder trauriger; happy glücklich PS happier glücklicher; sick krank PAS;
    brave mutig PA braver mutiger; strict streng P stricter strenger; strong stark PA stronger stärker;
    strange seltsam PRL stranger seltsamer; fast schnell V faster schneller; slow langsam V slower langsamer;
    broken kaputt EV;
    expensive teuer KFMDTCVRE; cheap billig KFMDTCVRE cheaper billiger; heavy schwer T heavier schwerer;
    red rot TCVK; blue blau TCV; green grün TCVK; yellow gelb TCV; black schwarz ACTV; white weiß ACTV;
    brown braun ACTW; grey grau ACV; fresh frisch f fresher frischer; ripe reif K riper reifer;
    sweet süß K sweeter süßer; sour sauer K; delicious köstlich FKM; good gut MDR better besser; cold kalt D;
    hot heiß D hotter heißer; valuable wertvoll TR; clean sauber TCV; dirty schmutzig TCV dirtier schmutziger;
    wet nass C; comfortable bequem Cc; quiet ruhig N quieter ruhiger; dark dunkel U"""
STEMS = {"müde": "müd", "teuer": "teur", "sauer": "saur", "dunkel": "dunkl"}
COLOURS = frozenset({"red", "blue", "green", "yellow", "black", "white", "brown", "grey"})
SIZES = frozenset({"big", "small", "old", "new", "beautiful"})

# English/-ing past, German/third person, participle, object classes, places. "~": event, "=": state, "^": animals too,
# "an-": separable prefix, "ist:": perfect with sein, "!": the place is needed.
VERB_TABLE = {
    "transitive": """buy bought kaufen gekauft KFMDRTCVE s; sell sold verkaufen verkauft KFMDRTCV s;
        ~see saw sehen/sieht gesehen PAVB nt; ~hear heard hören gehört PA -; =love loved lieben geliebt PA -;
        =know knew kennen gekannt P -; =need needed brauchen gebraucht TCVRE -; =have had haben/hat gehabt TCVAER -;
        =understand understood verstehen verstanden PL -; visit visited besuchen besucht P -;
        ~find found finden gefunden TCRA hnt; ~lose lost verlieren verloren TCR nt;
        ~forget forgot vergessen/vergisst vergessen TCR -; look_for looked suchen gesucht TCRAP hnt;
        carry carried tragen/trägt getragen T -; wear wore tragen/trägt getragen C -;
        wash washed waschen/wäscht gewaschen CVK -; repair repaired reparieren repariert VE -;
        read read lesen/liest gelesen RL hnt; write wrote schreiben geschrieben L h;
        eat ate essen/isst gegessen KFM h; drink drank trinken getrunken D h; cook cooked kochen gekocht H h;
        bake baked backen gebacken J h; order ordered bestellen bestellt FMD r;
        draw drew zeichnen gezeichnet ABP n;
        open opened öffnen geöffnet O -; take took nehmen/nimmt genommen TKF -;
        meet met treffen/trifft getroffen P nts; greet greeted begrüßen begrüßt P -;
        ask asked fragen gefragt P -; watch watched beobachten beobachtet PA n;
        feed fed füttern gefüttert A -; describe described beschreiben beschrieben PAB -;
        invite invited ein-laden/lädt eingeladen P -; call called an-rufen angerufen P -;
        pick_up picked ab-holen abgeholt P t; put_on/putting put an-ziehen angezogen C -;
        turn_on turned ein-schalten eingeschaltet E -; turn_off turned aus-schalten ausgeschaltet E -;
        look_at looked an-sehen/sieht angesehen BVA -; throw_away threw weg-werfen/wirft weggeworfen TCR -;
        pack packed ein-packen eingepackt TCR -""",
    "dative": """help helped helfen/hilft geholfen P ht; thank thanked danken gedankt P -;
        follow followed folgen ist:gefolgt PA -; =trust trusted vertrauen vertraut P -;
        listen_to listened zu-hören zugehört P -; answer answered antworten geantwortet P -;
        congratulate congratulated gratulieren gratuliert P -; ~forgive forgave verzeihen verziehen P -""",
    "giving": """give gave geben/gibt gegeben TCRKF -; show showed zeigen gezeigt TCRLVA -;
        send sent schicken geschickt LRC -; bring brought bringen gebracht TCRKFD -; lend lent leihen geliehen TRV -;
        ~promise promised versprechen/verspricht versprochen TCRV -; offer offered an-bieten angeboten KFDM -""",
    "prepositional": """wait_for waited warten gewartet P t auf accusative;
        talk_to talked sprechen/spricht gesprochen P ns mit dative; dance_with danced tanzen getanzt P hn mit dative;
        play_with played spielen gespielt A hn mit dative; dream_of dreamed träumen geträumt PA - von dative;
        think_of thought denken gedacht P - an accusative; laugh_about laughed lachen gelacht PL - über accusative;
        write_to wrote schreiben geschrieben P - an accusative""",
    "intransitive": """^sleep slept schlafen/schläft geschlafen - h; work worked arbeiten gearbeitet - hts;
        =live lived wohnen gewohnt - !c; ^sit/sitting sat sitzen gesessen - !hn; ^stand stood stehen gestanden - !nt;
        wait waited warten gewartet - tsn; ^play played spielen gespielt - hn; dance danced tanzen getanzt - hn;
        sing sang singen gesungen - hnt; laugh laughed lachen gelacht - -; cry cried weinen geweint - -;
        ^swim/swimming swam schwimmen ist:geschwommen - w; study studied lernen gelernt - ht;
        stay stayed bleiben ist:geblieben - !ht; get_up/getting got auf-stehen ist:aufgestanden - -;
        arrive arrived an-kommen ist:angekommen - a; go_shopping went ein-kaufen eingekauft - s;
        watch_television watched fern-sehen/sieht ferngesehen - h; have_breakfast had frühstücken gefrühstückt - h""",
    "motion": """go went gehen ist:gegangen - htsnc; drive drove fahren/fährt ist:gefahren - tsc;
        ^run/running ran laufen/läuft ist:gelaufen - hn; travel/travelling travelled reisen ist:gereist - c;
        come came kommen ist:gekommen - htsn; return returned zurück-kehren ist:zurückgekehrt - tc""",
    "laying": "put/putting put legen gelegt Y -",
    "standing": "put/putting put stellen gestellt Z -",
    "lying": "=lie/lying lay liegen gelegen Y -",
    "upright": "=stand stood stehen gestanden Z -",
    "owned": "=belong_to belonged gehören gehört P -",
    "weather": "rain rained regnen geregnet - -; snow snowed schneien geschneit - -",
    "saying": "say said sagen gesagt - -; know knew wissen gewusst - -; think thought glauben geglaubt - -",
    "asking": "ask asked fragen gefragt - -",
    "being": "be was sein/ist ist:gewesen - -",
}

# How often the frames in which something is done occur.
FRAME_WEIGHTS = {"transitive": 8, "dative": 2, "giving": 3, "prepositional": 2, "intransitive": 3, "motion": 3}

# English at, to, noun; German at, to, noun, gender; letters of the place; classes of the noun.
PLACE_TABLE = """in into garden in in Garten m h N; in into kitchen in in Küche f h N; in to park in in Park m n N;
    on onto balcony auf auf Balkon m h N; in into forest in in Wald m n N; at to river an an Fluss m n N;
    in to lake in an See m w N; in to sea in an Meer n w N; at to beach an an Strand m n N;
    in to school in zu Schule f t B; in to library in in Bibliothek f t B; in to hospital in in Krankenhaus n t B;
    at to station an zu Bahnhof m ta B; at to airport an zu Flughafen m ta B; in to museum in zu Museum n t BU;
    in to office in in Büro n t B; in to supermarket in in Supermarkt m s B; at to market auf auf Markt m s N;
    in to bakery in zu Bäckerei f s B; in to restaurant in in Restaurant n r BU; in to city in in Stadt f ca N;
    in to village in in Dorf n ca N"""

# When (p past, f future, h again and again, n now; "!" also in a negated clause), English, German.
TIME_TABLE = """p!|yesterday|gestern;p!|last week|letzte Woche;p!|last Monday|letzten Montag;
    p!|last summer|letzten Sommer;p!|yesterday evening|gestern Abend;p|three days ago|vor drei Tagen;
    p|a year ago|vor einem Jahr;f!|tomorrow|morgen;f!|tomorrow morning|morgen früh;f!|next week|nächste Woche;
    f!|next Friday|nächsten Freitag;f!|the day after tomorrow|übermorgen;f|soon|bald;f!|this evening|heute Abend;
    h|every morning|jeden Morgen;h|every day|jeden Tag;h|every evening|jeden Abend;h|every week|jede Woche;
    h!|in winter|im Winter;h!|in summer|im Sommer;h|on Mondays|montags;h|on Sundays|sonntags;
    n!|today|heute;n!|now|jetzt;n!|at the moment|im Moment;
    pf!|on Monday|am Montag;pf!|on Tuesday|am Dienstag;pf!|on Friday|am Freitag;pf!|on Saturday|am Samstag;
    pfh|in the morning|am Morgen;pfh|in the evening|am Abend;pfh|at midday|am Mittag"""
ADVERB_TABLE = "often|oft;always|immer;sometimes|manchmal;rarely|selten"


def _records(table: str) -> list[list[str]]:
    """The fields of each record of a table; "_" stands for a space and "-" for nothing."""
    rows = (record.split() for record in table.split(";"))
    return [["" if field == "-" else field.replace("_", " ") for field in row] for row in rows]


def _noun(fields: list[str], classes: str) -> Noun:
    english, english_plural, german, gender, german_plural = fields
    weak = gender == "w"
    return Noun(english, english_plural or None, german, "m" if weak else gender, german_plural or None, classes, weak)


def _adjective(english: str, german: str, classes: str, *comparatives: str) -> Adjective:
    pair = comparatives or (None, None)
    return Adjective(english, german, STEMS.get(german, german), classes, *pair)


def regular_t(stem: str) -> str:
    """A stem with the ending -t; "arbeit-t" and "öffn-t" cannot be said without an e."""
    return stem + ("et" if stem.endswith(("d", "t", "ffn", "gn", "chn")) else "t")


def _verb(fields: list[str]) -> Verb:
    name, past, infinitive, participle, objects, places, *government = [*fields]
    mark = name[0] if name[0] in "~=^" else ""
    english, _, ing = name.removeprefix(mark).partition("/")
    head = english.split()[0]
    prefix, _, rest = infinitive.rpartition("-")
    german, _, third = rest.partition("/")
    auxiliary, _, participle = participle.rpartition(":")
    return Verb(
        english=english,
        past=past,
        ing=ing or head.removesuffix("e") + "ing",
        german=german,
        third=third or regular_t(german.removesuffix("n").removesuffix("e")),
        participle=participle,
        prefix=prefix,
        auxiliary="sein" if auxiliary else "haben",
        kind={"~": "event", "=": "state"}.get(mark, "action"),
        subjects="PA" if mark == "^" else "P",
        objects=objects,
        places=places,
        preposition=government[0] if government else "",
        case=government[1] if government else "accusative",
    )


def _place(fields: list[str]) -> Place:
    english_at, english_to, english, german_at, german_to, german, gender, letter, classes = fields
    noun = Noun(english, None, german, gender, None, classes)
    return Place(noun, english_at, english_to, german_at, german_to, letter)


ENGLISH_UNITS, ENGLISH_TENS, GERMAN_UNITS, GERMAN_TENS = _records(NUMBER_TABLE)
NOUNS = [_noun(fields, classes) for classes, table in NOUN_TABLE.items() for fields in _records(table)]
ADJECTIVES = [_adjective(*fields) for fields in _records(ADJECTIVE_TABLE)]
VERBS = {frame: [_verb(fields) for fields in _records(table)] for frame, table in VERB_TABLE.items()}
PLACES = [_place(fields) for fields in _records(PLACE_TABLE)]
TIMES = [tuple(part.strip() for part in record.split("|")) for record in TIME_TABLE.split(";")]
ADVERBS = [tuple(record.split("|")) for record in ADVERB_TABLE.split(";")]
