/* mosquitto plugin: who a connection is, by the URI of its SVID, and for how long.
 *
 * 1. At CONNECT the certificate's one URI SAN becomes the user: `devices`NAME becomes NAME, the URI of an option `as_USER` becomes USER, and
 *    anything else is refused (another trust domain, another region, a device that bears a role's name).
 * 2. The client id must be that name: nobody takes over another's session.
 * 3. When the SVID expires its connection is ended; mosquitto itself looks at certificates only during the handshake.
 * 4. The one topic CONTROL takes the names, one a line, of all devices that are cut off. They are disconnected and come back as the user
 *    `quarantined`; who is not on the list any more is disconnected too, and comes back as himself. Only the ACL says who may publish there.
 * 5. Broker restarted: the list is empty until it is sent again, so its sender repeats it.
 *
 * The interface of plugin version 5 (mosquitto 2.0 and later) is declared here, so that a C compiler and libssl-dev are all that is needed.
 */
#include <openssl/x509v3.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CONTROL "$CONTROL/appliance/v1"
#define QUARANTINED "quarantined"
#define NAME_BYTES 64 /* RFC 5280, ub-common-name, and contract/topics.py */

enum { OK = 0, NO_MEMORY = 1, REFUSED = 11 };
enum { ON_CONNECT = 3, ON_CONTROL = 6, ON_TICK = 9, ON_DISCONNECT = 10 };
enum { LOG_NOTICE = 2 };

struct mosquitto;
struct option { char *key, *value; };
struct event { void *future; struct mosquitto *client; }; /* how each event begins that has a client */
struct control {
	void *future;
	struct mosquitto *client;
	const char *topic;
	const void *payload;
	const void *properties;
	char *reason_string;
	uint32_t payloadlen;
};

int mosquitto_callback_register(void *plugin, int event, int (*callback)(int, void *, void *), const void *topic, void *mine);
void *mosquitto_client_certificate(const struct mosquitto *client);
const char *mosquitto_client_id(const struct mosquitto *client);
int mosquitto_set_username(struct mosquitto *client, const char *username);
int mosquitto_kick_client_by_clientid(const char *id, bool with_will);
void mosquitto_log_printf(int level, const char *format, ...);

struct connection {
	struct connection *next;
	struct mosquitto *client; /* compared, never followed */
	time_t expires;
	bool quarantined;
	char name[NAME_BYTES + 1];
};

static struct connection *connections;
static char *cut; /* "\nname\nname\n" */
static bool cut_changed;
static struct option *options;
static int option_count;

static bool is_cut(const char *name)
{
	char line[NAME_BYTES + 3] = "\n";
	strcat(strcat(line, name), "\n");
	return cut && strstr(cut, line);
}

/* By connection, never by name alone: a second CONNECT that fails later must not hide the first one's end from us. */
static void forget(const struct mosquitto *client)
{
	for (struct connection **at = &connections; *at;) {
		struct connection *one = *at;
		if (one->client == client) {
			*at = one->next;
			free(one);
		} else {
			at = &one->next;
		}
	}
}

/* The name that a SPIFFE ID proves, or NULL. */
static const char *named(const char *id)
{
	const char *device = NULL;
	for (int i = 0; i < option_count; i++) {
		const char *key = options[i].key, *value = options[i].value;
		if (!strncmp(key, "as_", 3) && !strcmp(id, value))
			return key + 3;
		if (!strcmp(key, "devices") && !strncmp(id, value, strlen(value)))
			device = id + strlen(value);
	}
	if (!device || !*device || strlen(device) > NAME_BYTES || !strcmp(device, QUARANTINED))
		return NULL;
	if (device[strspn(device, "abcdefghijklmnopqrstuvwxyz0123456789-")])
		return NULL;
	for (int i = 0; i < option_count; i++)
		if (!strncmp(options[i].key, "as_", 3) && !strcmp(options[i].key + 3, device))
			return NULL;
	return device;
}

/* Copy the certificate's one URI SAN; false if it has none, several, or one that is too long or has a NUL in it. */
static bool spiffe_id(X509 *svid, char *into, size_t size)
{
	int found = 0;
	GENERAL_NAMES *names = X509_get_ext_d2i(svid, NID_subject_alt_name, NULL, NULL);
	for (int i = 0; i < sk_GENERAL_NAME_num(names); i++) {
		GENERAL_NAME *name = sk_GENERAL_NAME_value(names, i);
		if (name->type != GEN_URI)
			continue;
		size_t length = (size_t)ASN1_STRING_length(name->d.uniformResourceIdentifier);
		const char *text = (const char *)ASN1_STRING_get0_data(name->d.uniformResourceIdentifier);
		if (found++ || length >= size || memchr(text, 0, length)) {
			found = 2;
			break;
		}
		memcpy(into, text, length);
		into[length] = 0;
	}
	GENERAL_NAMES_free(names);
	return found == 1;
}

static int on_connect(int event, void *data, void *mine)
{
	struct mosquitto *client = ((struct event *)data)->client;
	const char *claimed = mosquitto_client_id(client), *name = NULL;
	char id[2048];
	struct tm end;
	bool dated = false;
	X509 *svid = mosquitto_client_certificate(client);
	if (svid && spiffe_id(svid, id, sizeof id)) {
		name = named(id);
		dated = ASN1_TIME_to_tm(X509_get0_notAfter(svid), &end) == 1;
	}
	X509_free(svid);
	if (!name || !dated || !claimed || strcmp(claimed, name)) {
		mosquitto_log_printf(LOG_NOTICE, "Refused: client id %s, identity %s.", claimed ? claimed : "-", name ? name : "none of this region");
		return REFUSED;
	}
	struct connection *one = calloc(1, sizeof *one);
	if (!one)
		return NO_MEMORY;
	forget(client);
	one->client = client;
	one->expires = timegm(&end);
	one->quarantined = is_cut(name);
	strcpy(one->name, name);
	one->next = connections;
	connections = one;
	return mosquitto_set_username(client, one->quarantined ? QUARANTINED : name);
}

static int on_disconnect(int event, void *data, void *mine)
{
	forget(((struct event *)data)->client);
	return OK;
}

/* Kicking removes from the list (on_disconnect), so the search begins anew after each. */
static int on_tick(int event, void *data, void *mine)
{
	static time_t last;
	time_t now = time(NULL);
	if (now == last)
		return OK;
	last = now;
	for (struct connection *one = connections; one;) {
		bool expired = one->expires <= now;
		if (!expired && (!cut_changed || one->quarantined == is_cut(one->name))) {
			one = one->next;
			continue;
		}
		const struct mosquitto *client = one->client;
		char name[NAME_BYTES + 1];
		strcpy(name, one->name);
		const char *why = expired ? "its SVID has expired" : one->quarantined ? "quarantined no longer" : "quarantined";
		mosquitto_log_printf(LOG_NOTICE, "Cut %s: %s.", name, why);
		mosquitto_kick_client_by_clientid(name, false);
		forget(client);
		one = connections;
	}
	cut_changed = false;
	return OK;
}

static int on_control(int event, void *data, void *mine)
{
	struct control *asked = data;
	char *fresh = malloc(asked->payloadlen + 3);
	if (!fresh)
		return NO_MEMORY;
	fresh[0] = '\n';
	if (asked->payloadlen)
		memcpy(fresh + 1, asked->payload, asked->payloadlen);
	strcpy(fresh + 1 + asked->payloadlen, "\n");
	cut_changed |= !cut || strcmp(cut, fresh);
	free(cut);
	cut = fresh;
	return OK;
}

int mosquitto_plugin_version(int count, const int *versions)
{
	for (int i = 0; i < count; i++)
		if (versions[i] == 5)
			return 5;
	return -1;
}

int mosquitto_plugin_init(void *plugin, void **mine, struct option *given, int count)
{
	options = given;
	option_count = count;
	int rc = mosquitto_callback_register(plugin, ON_CONNECT, on_connect, NULL, NULL);
	rc = rc ? rc : mosquitto_callback_register(plugin, ON_DISCONNECT, on_disconnect, NULL, NULL);
	rc = rc ? rc : mosquitto_callback_register(plugin, ON_TICK, on_tick, NULL, NULL);
	return rc ? rc : mosquitto_callback_register(plugin, ON_CONTROL, on_control, CONTROL, NULL);
}

int mosquitto_plugin_cleanup(void *mine, struct option *given, int count)
{
	while (connections)
		forget(connections->client);
	free(cut);
	cut = NULL;
	return OK;
}
