// SPDX-License-Identifier: Apache-2.0
// Java's own HTTP client with its defaults: it offers h2c with every request over plain HTTP.
// Arguments: the URL, and the bodies of a request, of a stream and of a refused request.
// It prints a line for each answer: a name, the status and the body.
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.CompletableFuture;

public class JavaClient {
  static URI uri;

  static HttpRequest.Builder request(HttpRequest.BodyPublisher body) {
    return HttpRequest.newBuilder(uri).header("Content-Type", "application/json").POST(body);
  }

  static void print(String name, HttpResponse<String> answer) {
    System.out.println(name + " " + answer.statusCode() + " " + answer.body());
  }

  public static void main(String[] arguments) throws Exception {
    uri = URI.create(arguments[0]);
    String body = arguments[1];
    HttpClient client = HttpClient.newHttpClient();
    if (client.version() != HttpClient.Version.HTTP_2) throw new AssertionError("no h2c");

    for (String name : List.of("first", "second")) // on one connection
      print(name, client.send(request(BodyPublishers.ofString(body)).build(), BodyHandlers.ofString()));

    HttpRequest streaming = request(BodyPublishers.ofString(arguments[2])).build();
    var lines = client.send(streaming, BodyHandlers.ofLines());
    lines.body().filter(line -> !line.isEmpty()).forEach(
        line -> System.out.println("stream " + lines.statusCode() + " " + line));

    HttpRequest refused = request(BodyPublishers.ofString(arguments[3])).build();
    print("refused", client.send(refused, BodyHandlers.ofString()));

    // Of unknown length, so that it goes in chunks; and a body that waits for "100 Continue".
    var chunks = BodyPublishers.fromPublisher(BodyPublishers.ofString(body));
    print("chunked", client.send(request(chunks).build(), BodyHandlers.ofString()));
    HttpRequest expecting = request(BodyPublishers.ofString(body)).expectContinue(true).build();
    print("expecting", client.send(expecting, BodyHandlers.ofString()));

    List<CompletableFuture<HttpResponse<String>>> answers = new ArrayList<>();
    for (int i = 0; i < 4; i++)
      answers.add(client.sendAsync(request(BodyPublishers.ofString(body)).build(), BodyHandlers.ofString()));
    for (var answer : answers) print("together", answer.get());
  }
}
